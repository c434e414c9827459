"""From ``data.source`` to a TextDataset: which reader, which columns, and what the labels are."""

from __future__ import annotations

import difflib
import math
from dataclasses import replace
from pathlib import Path

from layerlens.config import DataConfig
from layerlens.data.dataset import TextDataset
from layerlens.data.readers import READERS, Rows, read_hub_dataset, read_saved_dataset
from layerlens.data.stdlib_docstrings import stdlib_docstrings
from layerlens.exceptions import DataError, DataNotFoundError
from layerlens.storage import local_file

CLASSIFICATION, REGRESSION, CAUSAL_LM = "sequence-classification", "regression", "causal-lm"
HUB_PREFIX = "hf:"
FORMATS = ".jsonl, .csv or .parquet"
BUILTINS = {"builtin:stdlib-docstrings": stdlib_docstrings}
LABEL_COLUMNS = ("label", "labels", "class", "target")
TEXT_COLUMNS = ("text", "sentence", "content", "document", "review", "question")


def load_dataset(config: DataConfig, base_dir: Path | None = None, task: str = CLASSIFICATION) -> TextDataset:
    """The texts that ``config.source`` names, with the labels that ``task`` needs.

    Relative files are looked for below ``base_dir``.

    Raises:
        DataNotFoundError: no such built-in, file or data set.
        DataError: the data cannot be used; the message has the line or the columns it found.
    """
    if config.source.startswith("builtin:"):
        return _built_in(config.source, task)
    if config.source.startswith(HUB_PREFIX):
        rows, place = read_hub_dataset(config.source.removeprefix(HUB_PREFIX)), Path(config.source)
        return _as_dataset(rows, config, place, task)
    path = (base_dir or Path()) / local_file(config.source).expanduser()
    if path.is_dir():
        return _as_dataset(read_saved_dataset(path), config, path, task)
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
    return _as_dataset(rows, config, path, task)


def _built_in(source: str, task: str) -> TextDataset:
    if source not in BUILTINS:
        raise DataNotFoundError(f"data.source: unknown {source!r}; built in: {', '.join(BUILTINS)}")
    found = BUILTINS[source]()
    if task == REGRESSION:
        raise DataError(f"data.source: {source} has classes, not numbers; use it with {CLASSIFICATION} or {CAUSAL_LM}")
    if task == CAUSAL_LM:
        return replace(found, labels=(0.0,) * len(found), label_names=())
    return found


def _as_dataset(rows: Rows, config: DataConfig, path: Path, task: str) -> TextDataset:
    if not rows:
        raise DataError(f"data.source: {path} has no samples; give one JSON object or CSV record for each sample")
    columns = list(rows[0])
    label_column = None
    if task != CAUSAL_LM:
        label_column = _column(config.label_column, "label_column", columns, LABEL_COLUMNS, path)
    taken = (label_column, config.pair_column)
    texts_only = [name for name in columns if name not in taken and isinstance(rows[0][name], str)]
    guesses = TEXT_COLUMNS if len(texts_only) != 1 else (*TEXT_COLUMNS, texts_only[0])
    text_column = _column(config.text_column, "text_column", columns, guesses, path)
    texts = _texts(rows, text_column, path)
    pairs: tuple[str, ...] = ()
    if config.pair_column is not None:
        pairs = _texts(rows, _column(config.pair_column, "pair_column", columns, (), path), path)
    if label_column is None:
        return TextDataset(texts, (0.0,) * len(texts), (), path.name, pairs)
    if task == REGRESSION:
        return TextDataset(texts, _numbers(rows, label_column, path), (), path.name, pairs)
    labels, names = _classes(rows, label_column, path)
    return TextDataset(texts, labels, names, path.name, pairs)


def _texts(rows: Rows, column: str, path: Path) -> tuple[str, ...]:
    for number, row in enumerate(rows, start=1):
        text = row.get(column)
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"data.source: {path}: sample {number} has no text in column {column!r}, got {text!r}")
    return tuple(row[column] for row in rows)


def _numbers(rows: Rows, column: str, path: Path) -> tuple[float, ...]:
    numbers = []
    for number, row in enumerate(rows, start=1):
        try:
            value = float(row.get(column))  # type: ignore[arg-type]
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise DataError(
                f"data.source: {path}: sample {number} has no finite number in column {column!r}, got "
                f"{row.get(column)!r}; regression needs one for each sample"
            )
        numbers.append(value)
    return tuple(numbers)


def _classes(rows: Rows, column: str, path: Path) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Indices, and the names that they are indices into."""
    raw_labels = []
    for number, row in enumerate(rows, start=1):
        label = row.get(column)
        if not isinstance(label, (str, int)) or label == "":
            raise DataError(
                f"data.source: {path}: sample {number} has no class in column {column!r}, got {label!r}; "
                "classes are strings or integers"
            )
        raw_labels.append(str(label))
    names = sorted(set(raw_labels), key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))
    if len(names) < 2:
        raise DataError(f"data.source: {path}: column {column!r} has one class only ({names[0]!r}); two are needed")
    index = {name: position for position, name in enumerate(names)}
    return tuple(index[label] for label in raw_labels), tuple(names)


def _column(given: str | None, key: str, columns: list[str], guesses: tuple[str, ...], path: Path) -> str:
    """The column that the user named, or the first of ``guesses`` that is there."""
    if given is not None:
        if given in columns:
            return given
        near = difflib.get_close_matches(given, columns, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"data.{key}: {path} has no column {given!r}; it has {', '.join(columns)}{hint}")
    for guess in guesses:
        if guess in columns:
            return guess
    raise DataError(
        f"data.{key}: found no usable column in {path}, which has {', '.join(columns)}; name one in data.{key}"
    )
