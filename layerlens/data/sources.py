"""From ``data.source`` to a Dataset: which reader, and then what the task takes from the rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from layerlens.config import DataConfig
from layerlens.data.by_task import READ
from layerlens.data.columns import Table
from layerlens.data.dataset import Dataset
from layerlens.data.readers import READERS, Rows, read_hub_dataset, read_saved_dataset
from layerlens.data.stdlib_docstrings import stdlib_docstrings
from layerlens.exceptions import DataError, DataNotFoundError

HUB_PREFIX = "hf:"
FORMATS = ".jsonl, .csv or .parquet"
BUILTINS = {"builtin:stdlib-docstrings": stdlib_docstrings}
OWN_TARGETS = ("causal-lm", "masked-lm")
"""Tasks for which the classes of a built-in are left aside."""


def load_dataset(config: DataConfig, base_dir: Path | None = None, task: str = "sequence-classification") -> Dataset:
    """The samples that ``config.source`` names, with the targets that ``task`` needs.

    Relative files are looked for below ``base_dir``.

    Raises:
        DataNotFoundError: no such built-in, file or data set.
        DataError: the data cannot be used; the message has the line or the columns it found.
    """
    if config.source.startswith("builtin:"):
        return _built_in(config.source, task)
    if config.source.startswith(HUB_PREFIX):
        rows = read_hub_dataset(config.source.removeprefix(HUB_PREFIX))
        return _as_dataset(rows, config, config.source, task)
    path = (base_dir or Path()) / Path(config.source).expanduser()
    if path.is_dir():
        return _as_dataset(read_saved_dataset(path), config, str(path), task)
    if not path.is_file():
        raise DataNotFoundError(
            f"data.source: no file at {path}; give a {FORMATS} file, a directory that datasets saved, hf:NAME, or "
            f"{next(iter(BUILTINS))}"
        )
    if path.suffix.lower() not in READERS:
        raise DataError(f"data.source: {path.name} is not {FORMATS}; convert it, or give another file")
    try:
        rows = READERS[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise DataError(f"data.source: {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    return _as_dataset(rows, config, str(path), task)


def _built_in(source: str, task: str) -> Dataset:
    if source not in BUILTINS:
        raise DataNotFoundError(f"data.source: unknown {source!r}; built in: {', '.join(BUILTINS)}")
    found = BUILTINS[source]()
    if task in OWN_TARGETS and found.texts:
        return replace(found, labels=(None,) * len(found), label_names=())
    if task != "sequence-classification":
        raise DataError(
            f"data.source: {source} has texts with classes, which {task} cannot be trained on; use it with "
            f"sequence-classification, {' or '.join(OWN_TARGETS)}"
        )
    return found


def _as_dataset(rows: Rows, config: DataConfig, place: str, task: str) -> Dataset:
    if not rows:
        raise DataError(f"data.source: {place} has no samples; give one JSON object or CSV record for each sample")
    found = READ[task](Table(rows, place), config)
    return replace(found, description=Path(place).name)
