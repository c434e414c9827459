"""From ``data.source`` to a Dataset: which reader, and then what the task takes from the rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from layerlens.config import DataConfig
from layerlens.data.by_task import READ
from layerlens.data.columns import Table, class_names
from layerlens.data.custom import own_dataset
from layerlens.data.dataset import Dataset
from layerlens.data.detection import detection_dataset
from layerlens.data.digits import digits
from layerlens.data.images import image_folder
from layerlens.data.readers import READERS, Rows, read_hub_dataset, read_saved_dataset
from layerlens.data.stdlib_docstrings import stdlib_docstrings
from layerlens.exceptions import DataError, DataNotFoundError
from layerlens.storage import local_file
from layerlens.utils.user_code import REFERENCE, load_function

HUB_PREFIX = "hf:"
FORMATS = ".jsonl, .csv or .parquet"
BUILTINS = {"builtin:stdlib-docstrings": stdlib_docstrings, "builtin:digits": digits}
SAVED_DATASET = ("state.json", "dataset_dict.json")
OWN_TARGETS = ("causal-lm", "masked-lm")
"""Tasks for which the classes of a built-in are left aside."""


def load_dataset(config: DataConfig, base_dir: Path | None = None, task: str = "sequence-classification") -> Dataset:
    """The samples that ``config.source`` names, with the targets that ``task`` needs.

    Relative files are looked for below ``base_dir``.

    Raises:
        DataNotFoundError: no such built-in, file or data set.
        DataError: the data cannot be used; the message has the line or the columns it found.
    """
    if task == "object-detection":
        return detection_dataset(config.source, base_dir, config.max_image_pixels)
    if config.source.startswith("builtin:"):
        return _built_in(config.source, task)
    if config.source.startswith(HUB_PREFIX):
        rows = read_hub_dataset(config.source.removeprefix(HUB_PREFIX))
        return _as_dataset(rows, config, config.source, task)
    path = (base_dir or Path()) / local_file(config.source).expanduser()
    if REFERENCE.fullmatch(config.source) and not path.exists():
        return _own(config, base_dir, task)
    if task == "custom":
        raise DataError("data.source: the task custom takes module:function, which returns a data set or batches")
    if path.is_dir() and task == "image-classification" and not any((path / name).exists() for name in SAVED_DATASET):
        images, labels = image_folder(path, config.max_image_pixels)
        names = class_names(labels)
        index = {name: position for position, name in enumerate(names)}
        return Dataset({"image": images}, tuple(index[label] for label in labels), names, path.name)
    if path.is_dir():
        return _as_dataset(read_saved_dataset(path), config, str(path), task)
    if not path.is_file():
        raise DataNotFoundError(
            f"data.source: no file at {path}; give a {FORMATS} file, a folder of images, a directory that datasets "
            f"saved, hf:NAME, module:function, or {next(iter(BUILTINS))}"
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
    fit = ("sequence-classification", *OWN_TARGETS) if found.texts else ("image-classification",)
    if task not in fit:
        raise DataError(
            f"data.source: {source} has {'texts' if found.texts else 'images'} with classes, which {task} cannot be "
            f"trained on; use it with {' or '.join(fit)}"
        )
    return found


def _own(config: DataConfig, base_dir: Path | None, task: str) -> Dataset:
    """What a function of the user returns: samples of the task custom, rows for every other."""
    returned = load_function(config.source, "data.source", base_dir)()
    if task == "custom":
        return own_dataset(returned, config.source)
    rows = list(returned)
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"data.source: {config.source} must return rows (mappings of column to value) for {task}")
    return _as_dataset(rows, config, config.source, task)


def _as_dataset(rows: Rows, config: DataConfig, place: str, task: str) -> Dataset:
    if not rows:
        raise DataError(f"data.source: {place} has no samples; give one JSON object or CSV record for each sample")
    found = READ[task](Table(rows, place), config)
    return replace(found, description=Path(place).name)
