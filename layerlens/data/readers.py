"""Rows of a file, by its suffix; what is no row is left out, with its line.

Files are read a line (Parquet: a batch) at a time, and a row that is not kept is not parsed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerlens.config import DataConfig
from layerlens.data.conll import read_conll, read_conllu
from layerlens.data.csv_files import read_csv, unique_names
from layerlens.data.hub import read_arrow_file
from layerlens.data.json_values import BeyondParser, array_items, columns_as_rows, object_of, parsed, squad_rows
from layerlens.data.rows import SourceRows
from layerlens.data.text_files import PACKED, Line, encoding_noted, lines_of, suffix_of
from layerlens.data.values import without_gaps
from layerlens.exceptions import DataError

BATCH_ROWS = 1024

Reader = Callable[[Path, DataConfig, SourceRows], None]


def read_jsonl(path: Path, config: DataConfig, found: SourceRows) -> None:
    """One JSON object a line; blank lines are skipped. A file with one JSON array is read as that."""
    encoding, begun = encoding_noted(path, config, found), False
    for line in lines_of(path, encoding):
        if not line.text.strip():
            continue
        if not begun and line.text.lstrip().startswith("["):
            _read_array(path, encoding, found)
            return
        begun = True
        if found.wanted():
            _add_object(line, found)


def _add_object(line: Line, found: SourceRows) -> None:
    if line.fault:
        found.leave_out(f"(line {line.number}) is not text: {line.fault}")
        return
    try:
        value = object_of(line.text.rstrip(), found)
    except BeyondParser as error:
        found.leave_out(f"(line {line.number}) is not readable JSON: {error.msg}")
        return
    except json.JSONDecodeError as error:
        found.leave_out(f"(line {line.number}, column {error.colno}) is not JSON: {error.msg}")
        return
    if isinstance(value, dict):
        found.add(value, line.n_bytes)
    else:
        found.leave_out(f"(line {line.number}) must be a JSON object, got {type(value).__name__}")


def read_json(path: Path, config: DataConfig, found: SourceRows) -> None:
    """An array of objects; an object with such an array in it, or with a list for each column; or JSON lines.

    Raises:
        DataError: it is none of these.
    """
    encoding = encoding_noted(path, config, found)
    start = next((line.text.lstrip() for line in lines_of(path, encoding) if line.text.strip()), "")
    if start.startswith("["):
        _read_array(path, encoding, found)
        return
    try:
        parsed(start)
    except BeyondParser:
        whole = False  # which of the lines can be read is then said line by line
    except json.JSONDecodeError as error:
        if error.msg.startswith("Extra data"):
            raise DataError(f"data.source: {path}: line 1: not JSON: {error.msg}; give one object a line") from error
        whole = True  # one object over several lines
    else:
        rest = (line for line in lines_of(path, encoding) if line.text.strip())
        next(rest, None)
        whole = next(rest, None) is None
    if not whole:
        read_jsonl(path, config, found)
        return
    try:
        value = parsed("".join(line.text for line in lines_of(path, encoding)))
    except json.JSONDecodeError as error:
        place = "it" if isinstance(error, BeyondParser) else f"line {error.lineno}, column {error.colno}"
        raise DataError(f"data.source: {path}: {place} is not JSON: {error.msg}") from error
    for row in columns_as_rows(value, path, found):
        if found.wanted():
            _add_item(row, found)


def _read_array(path: Path, encoding: str, found: SourceRows) -> None:
    for item, n_bytes in array_items(path, lines_of(path, encoding), found):
        if found.wanted():
            _add_item(item, found, n_bytes)


def _add_item(item: Any, found: SourceRows, n_bytes: int = 0) -> None:
    questions = squad_rows(item)
    if questions:
        found.note("the rows are the questions of its paragraphs")
        for place, row in enumerate(questions):
            if place == 0 or found.wanted():
                found.add(row, n_bytes // len(questions))
    elif isinstance(item, dict):
        found.add(item, n_bytes)
    else:
        found.leave_out(f"must be a JSON object, got {type(item).__name__}")


def read_parquet(path: Path, config: DataConfig, found: SourceRows) -> None:
    """The rows of a Parquet file.

    Raises:
        DataError: it is no Parquet file, or pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise DataError(
            f"data.source: {path.name} needs pyarrow; run: pip install 'layerlens[hf]', or convert it to .jsonl"
        ) from error
    try:
        with ParquetFile(path) as file:
            names = unique_names(file.schema_arrow.names, found)
            for batch in file.iter_batches(BATCH_ROWS):
                n_bytes = batch.nbytes // max(1, batch.num_rows)
                wanted_of = [[without_gaps(value) for value in _values_of(column)] for column in batch.columns]
                for values in zip(*wanted_of, strict=True):
                    odd = next((value for value in values if isinstance(value, OddValue)), None)
                    if not found.wanted():
                        continue
                    if odd is None:
                        found.add(dict(zip(names, values, strict=True)), n_bytes)
                    else:
                        found.leave_out(f"has a value that Python cannot hold: {odd.why}")
    except (ArrowException, OSError, UnicodeDecodeError) as error:  # the last: names of columns that are no text
        raise DataError(f"data.source: {path} is not a Parquet file: {str(error).splitlines()[0]}") from error


def read_arrow(path: Path, config: DataConfig, found: SourceRows) -> None:
    """The rows of a file that ``datasets`` keeps in its cache or in a saved data set.

    Raises:
        DataError: it is none, or datasets is not installed.
    """
    read_arrow_file(path, found)


@dataclass(frozen=True)
class OddValue:
    """A value of a column that has no Python value, such as a date in the year 5881580."""

    why: str


def _values_of(column: Any) -> list[Any]:
    """The values of a column of Arrow's, as Python has them."""
    try:
        values: list[Any] = column.to_pylist()
    except (OverflowError, ValueError):  # Arrow's own exceptions are ValueErrors, too
        return [_value_of(one) for one in column]
    return values


def _value_of(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (OverflowError, ValueError) as error:
        return OddValue(str(error).splitlines()[0])


def read_text(path: Path, config: DataConfig, found: SourceRows) -> None:
    """Plain text: every line that is not blank is one, as ``datasets``' ``text`` has it."""
    found.note("each line is a text")
    for line in lines_of(path, encoding_noted(path, config, found)):
        if not line.text.strip() or not found.wanted():
            continue
        if line.fault:
            found.leave_out(f"(line {line.number}) is not text: {line.fault}")
        else:
            found.add({"text": line.text.rstrip("\r\n")}, line.n_bytes)


def _conll(read: Callable[[Iterator[Line], SourceRows], None]) -> Reader:
    def reader(path: Path, config: DataConfig, found: SourceRows) -> None:
        read(lines_of(path, encoding_noted(path, config, found)), found)

    return reader


OF_ARROW = (".parquet", ".arrow")
JSON_LINES, CSV = (".jsonl", ".ndjson", ".jsonlines"), (".csv", ".tsv")
READERS: dict[str, Reader] = {
    **dict.fromkeys(JSON_LINES, read_jsonl),
    ".json": read_json,
    **dict.fromkeys(CSV, read_csv),
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    **dict.fromkeys((".conll", ".bio", ".iob", ".iob2", ".conll2003"), _conll(read_conll)),
    ".conllu": _conll(read_conllu),
    ".txt": read_text,
}
OF_WORDS: dict[str, Reader] = dict.fromkeys((".txt", ".tsv"), _conll(read_conll))
"""What files of these suffixes are where a task takes lists of words."""


def reader_of(path: Path, of_words: bool) -> Reader | None:
    """The reader of a file; None where there is none for its suffix."""
    suffix = suffix_of(path)
    if suffix in OF_ARROW and path.suffix.lower() in PACKED:
        return None
    return (OF_WORDS if of_words else {}).get(suffix) or READERS.get(suffix)
