"""From ``data.source`` to a TextDataset: built-in names, JSONL and CSV files."""

from __future__ import annotations

import csv
import difflib
import json
from pathlib import Path
from typing import Any

from layerlens.config import DataConfig
from layerlens.data.dataset import TextDataset
from layerlens.data.stdlib_docstrings import stdlib_docstrings
from layerlens.exceptions import DataError, DataNotFoundError

BUILTINS = {"builtin:stdlib-docstrings": stdlib_docstrings}
LABEL_COLUMNS = ("label", "labels", "class", "target")
TEXT_COLUMNS = ("text", "sentence", "content", "document", "review", "question")
MAX_CSV_FIELD = 2**31 - 1


def load_dataset(config: DataConfig, base_dir: Path | None = None) -> TextDataset:
    """The labelled texts that ``config.source`` names; relative files are looked for below ``base_dir``.

    Raises:
        DataNotFoundError: no such built-in or file.
        DataError: the file cannot be used; the message has the line or the columns it found.
    """
    if config.source.startswith("builtin:"):
        if config.source not in BUILTINS:
            raise DataNotFoundError(f"data.source: unknown {config.source!r}; built in: {', '.join(BUILTINS)}")
        return BUILTINS[config.source]()
    path = (base_dir or Path()) / Path(config.source).expanduser()
    if not path.is_file():
        raise DataNotFoundError(
            f"data.source: no file at {path}; give a .jsonl or .csv file, or {next(iter(BUILTINS))}"
        )
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise DataError(f"data.source: {path.name} is not .jsonl or .csv; convert it, or give another file")
    try:
        rows = readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise DataError(f"data.source: {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    return _as_dataset(rows, config, path)


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"data.source: {path}:{number}:{min(error.colno, len(line.rstrip()) + 1)}: not JSON: {error.msg}"
                ) from error
            if not isinstance(row, dict):
                raise DataError(
                    f"data.source: {path}:{number}: every line must be a JSON object, got {type(row).__name__}"
                )
            rows.append(row)
    return rows


def _read_csv(path: Path) -> list[dict[str, Any]]:
    csv.field_size_limit(MAX_CSV_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, restkey="", strict=True)
        try:
            rows = list(reader)
        except csv.Error as error:
            raise DataError(f"data.source: {path}:{reader.line_num}: not CSV: {error}") from error
    for number, row in enumerate(rows, start=2):
        if "" in row or None in row.values():
            raise DataError(
                f"data.source: {path}: record {number} has not the {len(reader.fieldnames or ())} fields of the header"
            )
    return rows


def _as_dataset(rows: list[dict[str, Any]], config: DataConfig, path: Path) -> TextDataset:
    if not rows:
        raise DataError(f"data.source: {path} has no samples; give one JSON object or CSV record for each sample")
    columns = list(rows[0])
    label_column = _column(config.label_column, "label_column", columns, LABEL_COLUMNS, path)
    texts_only = [name for name in columns if name != label_column and isinstance(rows[0][name], str)]
    guesses = TEXT_COLUMNS if len(texts_only) != 1 else (*TEXT_COLUMNS, texts_only[0])
    text_column = _column(config.text_column, "text_column", columns, guesses, path)
    texts, raw_labels = [], []
    for number, row in enumerate(rows, start=1):
        text, label = row.get(text_column), row.get(label_column)
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"data.source: {path}: sample {number} has no text in column {text_column!r}, got {text!r}")
        if not isinstance(label, (str, int)) or label == "":
            raise DataError(
                f"data.source: {path}: sample {number} has no class in column {label_column!r}, got {label!r}; "
                "classes are strings or integers"
            )
        texts.append(text)
        raw_labels.append(str(label))
    names = sorted(set(raw_labels), key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))
    if len(names) < 2:
        raise DataError(
            f"data.source: {path}: column {label_column!r} has one class only ({names[0]!r}); two are needed"
        )
    index = {name: position for position, name in enumerate(names)}
    return TextDataset(tuple(texts), tuple(index[label] for label in raw_labels), tuple(names), path.name)


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
