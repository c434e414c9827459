"""Rows of a file or data set, each a mapping of column to value, with the place of what cannot be read."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from layerlens.exceptions import DataError, DataNotFoundError

Rows = list[dict[str, Any]]
MAX_CSV_FIELD = 2**31 - 1
DEFAULT_SPLIT = "train"
FIRST = 1000
"""Rows that say what a source is like: which column has labels, and which task it is for."""


def read_jsonl(path: Path, limit: int | None = None) -> Rows:
    """One JSON object a line; blank lines are skipped; no more than ``limit``.

    Raises:
        DataError: with line and column of what is no JSON object.
    """
    rows: Rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if len(rows) == limit:
                break
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


def read_csv(path: Path, limit: int | None = None) -> Rows:
    """Records under a header line, no more than ``limit``.

    Raises:
        DataError: with the line of what is no CSV, or the record that has not as many fields as the header.
    """
    csv.field_size_limit(MAX_CSV_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, restkey="", strict=True)
        try:
            rows = list(itertools.islice(reader, limit))
        except csv.Error as error:
            raise DataError(f"data.source: {path}:{reader.line_num}: not CSV: {error}") from error
    for number, row in enumerate(rows, start=2):
        if "" in row or None in row.values():
            raise DataError(
                f"data.source: {path}: record {number} has not the {len(reader.fieldnames or ())} fields of the header"
            )
    return rows


def read_parquet(path: Path, limit: int | None = None) -> Rows:
    """The rows of a Parquet file, no more than ``limit``.

    Raises:
        DataError: it is no Parquet file, or pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile, read_table
    except ModuleNotFoundError as error:
        raise DataError(
            f"data.source: {path.name} needs pyarrow; run: pip install 'layerlens[hf]', or convert it to .jsonl"
        ) from error
    try:
        if limit is None:
            return read_table(path).to_pylist()
        return next((batch.to_pylist() for batch in ParquetFile(path).iter_batches(batch_size=limit)), [])
    except (ArrowException, OSError) as error:
        raise DataError(f"data.source: {path} is not a Parquet file: {str(error).splitlines()[0]}") from error


def read_saved_dataset(path: Path, limit: int | None = None) -> Rows:
    """A directory that ``datasets`` wrote with ``save_to_disk``; of several splits the one named train.

    Raises:
        DataError: it is no such directory, or has no split named train.
    """
    datasets = _datasets_library(str(path))
    try:
        loaded = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise DataError(
            f"data.source: {path} is a directory, but not one that datasets' save_to_disk wrote; give a file in it"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if DEFAULT_SPLIT not in loaded:
            raise DataError(
                f"data.source: {path} has the splits {', '.join(loaded)} and none named {DEFAULT_SPLIT!r}; give the "
                f"directory of one, such as {path / next(iter(loaded))}"
            )
        loaded = loaded[DEFAULT_SPLIT]
    return dataset_rows(loaded)


def read_hub_dataset(name: str, limit: int | None = None) -> Rows:
    """``NAME`` or ``NAME:SPLIT`` from the Hugging Face hub or its local cache.

    Raises:
        DataNotFoundError: there is no such data set or split, or the hub cannot be reached and nothing is cached.
    """
    dataset, _, split = name.partition(":")
    library = _datasets_library(f"hf:{name}")
    try:
        return dataset_rows(library.load_dataset(dataset, split=split or DEFAULT_SPLIT))
    except (OSError, ValueError, RuntimeError) as error:  # the library's own errors derive from these
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataNotFoundError(f"data.source: cannot load hf:{name}: {first_line}") from error


def dataset_rows(dataset: Any) -> Rows:
    """Rows with the names of classes, single ones or lists of them, in place of their numbers; images encoded."""
    from datasets import Image

    images = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    for name in images:
        dataset = dataset.cast_column(name, Image(decode=False))
    rows: Rows = [dict(row) for row in dataset]
    for name, feature in dataset.features.items():
        inner = getattr(feature, "feature", None)  # of a list
        if hasattr(feature, "int2str"):
            for row in rows:
                row[name] = _class_name(feature, row[name])
        elif hasattr(inner, "int2str"):
            for row in rows:
                row[name] = [_class_name(inner, value) for value in row[name] or ()]
    return rows


def _class_name(feature: Any, value: Any) -> Any:
    """The name of class ``value``; what is no class (-1 where the labels are hidden) as it is."""
    return feature.int2str(value) if isinstance(value, int) and value >= 0 else value


def _datasets_library(source: str) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DataError(f"data.source: {source} needs the datasets library: pip install 'layerlens[hf]'") from error
    return datasets


READERS: dict[str, Callable[[Path, int | None], Rows]] = {
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
