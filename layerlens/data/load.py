"""From ``data.source`` to a Dataset: which reader, what the task takes from the rows, and the built-in data sets."""

from __future__ import annotations

import ast
import contextlib
import inspect
import lzma
import sysconfig
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.data.folders import folder_note, shards, text_class
from layerlens.data.hub import read_hub_dataset, read_saved_dataset
from layerlens.data.images import StoredImage
from layerlens.data.pixels import SUFFIXES as IMAGE_SUFFIXES
from layerlens.data.read import check_rows, dataset_of
from layerlens.data.readers import reader_of
from layerlens.data.rows import FIRST, Enough, Rows, SourceRows
from layerlens.data.sounds import has_sound_folder
from layerlens.data.table import Table
from layerlens.data.text_files import encoding_noted, lines_of
from layerlens.exceptions import DataError, DataNotFoundError
from layerlens.registry import TASKS
from layerlens.storage import local_file
from layerlens.utils.places import check_readable, did_you_mean
from layerlens.utils.user_code import REFERENCE, load_function

HUB_PREFIX, BUILT_IN_PREFIX = "hf:", "builtin:"
FORMATS = ".jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt or .conll"
SAVED_DATASET = ("state.json", "dataset_dict.json")

# Packages that CPython 3.10 to 3.13 share and that distributions do not strip (tkinter and idlelib often are).
PACKAGES = (
    "asyncio",
    "collections",
    "concurrent",
    "email",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "xml",
)
MIN_CHARACTERS = 20
BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")
"""Fields of a statement that have statements in them, in their order."""
BRIGHTEST = 16
"""scikit-learn's pixels are counts from 0 to 16."""


def load_dataset(
    config: DataConfig, base_dir: Path | None = None, task: str = "sequence-classification", first: int | None = None
) -> Dataset:
    """The samples that ``config.source`` names, with the targets that ``task`` needs.

    Relative files are looked for below ``base_dir``. Where the first rows are enough, ``first`` of them are read.

    Raises:
        DataNotFoundError: no such built-in, file or data set.
        DataError: the data cannot be used; the message has the line or the columns it found.
    """
    kind = TASKS[task]
    if kind.load is not None:
        loaded: Dataset = kind.load(config, base_dir)
        return loaded
    if config.source.startswith(BUILT_IN_PREFIX):
        return _built_in(config.source, kind)
    if kind.read_folder is not None and (folder := media_folder_of(config.source, base_dir)):
        read: Dataset = kind.read_folder(folder, config)
        return read
    found, place = source_rows(config, base_dir, first, of_words=kind.inputs == "words")
    try:
        return replace(dataset_of(found.finished(), place, config, kind.read), description=Path(place).name)
    except DataError as error:
        error.args = (f"{error}{_others_for(task, found, place, config)}",)
        raise


def _others_for(task: str, found: SourceRows, place: str, config: DataConfig) -> str:
    """What other tasks say of rows that are not for this one, as the end of a message."""
    table = Table(found.rows[:FIRST], place, found.numbers, whole=False)
    kinds = [kind for name, kind in ((name, TASKS[name]) for name in TASKS) if name != task and kind.claim is not None]
    if not len(table.rows) or TASKS[task].claim is None or TASKS[task].claim(table, config) is not None:
        return ""
    claims = [(kind.name, claim) for kind in kinds if (claim := kind.claim(table, config)) is not None]
    most = max((claim.columns for _, claim in claims), default=0)
    said = [f"model.task: {name} ({claim.why})" for name, claim in claims if claim.columns == most]
    return f"; the rows look like data for {' or '.join(said)}" if said else ""


def first_rows(config: DataConfig, base_dir: Path | None = None) -> Table:
    """The first rows of a source whose task is not known yet.

    Raises:
        DataNotFoundError: no such file or data set.
        DataError: it cannot be read, or none of the first rows can be used.
    """
    found, place = source_rows(config, base_dir, FIRST, of_words=None)
    check_rows(found, place)
    return Table(found.rows, place, found.numbers, whole=False)


def source_rows(
    config: DataConfig, base_dir: Path | None, first: int | None, of_words: bool | None
) -> tuple[SourceRows, str]:
    """The rows of a file, a folder of files, a data set or a function, and its place.

    Args:
        config: has the source.
        base_dir: folder that a relative one is looked for in.
        first: rows after which reading ends; None for all.
        of_words: whether the task takes lists of words, which some files are read as; None if it is not known.

    Raises:
        DataNotFoundError: no such file or data set.
        DataError: it cannot be read; the message has the line.
    """
    source, found = config.source, SourceRows(config.max_rows if first is None else None, first=first)
    if source.startswith(HUB_PREFIX):
        read_hub_dataset(source.removeprefix(HUB_PREFIX), found, base_dir)
        return found, source
    path = (base_dir or Path()) / local_file(source).expanduser()
    if REFERENCE.fullmatch(source) and not path.exists():
        return SourceRows.of(rows_of_function(source, base_dir)[:first], first=first), source
    if not path.is_file() and not path.is_dir():
        raise DataNotFoundError(
            f"data.source: no file at {path}; give a {FORMATS} file, a folder of them, of images or of sound, a "
            f"directory that datasets saved, hf:NAME, module:function, or {next(iter(BUILT_IN))}{did_you_mean(path)}"
        )
    with contextlib.suppress(Enough):
        _read_place(path, config, found, of_words)
    return found, str(path)


def _read_place(path: Path, config: DataConfig, found: SourceRows, of_words: bool | None) -> None:
    if path.is_dir():
        files = [] if is_saved_dataset(path) else shards(path, of_words is not False)
        classes = text_class(path, files) if files and not of_words else {}
        if classes:
            for file in files:
                check_readable(file, path)
                _read_whole(file, classes[file], config, found)
            found.note(f"each file is a text of the class that its folder is named by; {folder_note(path, files)}")
        elif files:
            for file in files:
                check_readable(file, path)
                words = reader_of(file, of_words=False) is None if of_words is None else of_words
                _read_file(file, words, config, found)
            found.note(folder_note(path, files))
        else:
            read_saved_dataset(path, found)
        return
    if reader_of(path, bool(of_words)) is None and of_words is None:
        of_words = True
    _read_file(path, bool(of_words), config, found)


def _read_file(path: Path, of_words: bool, config: DataConfig, found: SourceRows) -> None:
    reader = reader_of(path, of_words)
    if reader is None:
        raise DataError(f"data.source: {path.name} is not {FORMATS}; convert it, or give another file")
    try:
        reader(path, config, found)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:  # of damaged packed files
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise DataError(f"data.source: cannot read {path}: {why}") from error


def _read_whole(path: Path, name: str, config: DataConfig, found: SourceRows) -> None:
    """One file as a text of the class ``name``."""
    lines = list(lines_of(path, encoding_noted(path, config, found)))
    if not found.wanted():
        return
    if fault := next((line.fault for line in lines if line.fault), ""):
        found.leave_out(f"({path.name}) is not text: {fault}")
    else:
        found.add({"text": "".join(line.text for line in lines).strip(), "label": name}, path.stat().st_size)


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``datasets`` wrote this folder with ``save_to_disk``."""
    return any((folder / name).exists() for name in SAVED_DATASET)


def media_folder_of(source: str, base_dir: Path | None = None) -> Path | None:
    """The directory that a source names, where it has images, or sound without a table, or nothing else that could be
    read; else None.
    """
    if source.startswith((BUILT_IN_PREFIX, HUB_PREFIX)):
        return None
    path = (base_dir or Path()) / local_file(source).expanduser()
    if not path.is_dir() or is_saved_dataset(path):
        return None
    has_images = any(file.suffix.lower() in IMAGE_SUFFIXES for file in path.rglob("*"))
    return path if has_images or has_sound_folder(path) or not shards(path, of_words=True) else None


def rows_of_function(source: str, base_dir: Path | None) -> Rows:
    """The rows that a function of the user returns.

    Raises:
        ConfigurationError: no such function.
        DataError: it returns something else.
    """
    rows = list(load_function(source, "data.source", base_dir)())
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"data.source: {source} must return rows (mappings of column to value)")
    return rows


def _built_in(source: str, task: Any) -> Dataset:
    if source not in BUILT_IN:
        raise DataNotFoundError(f"data.source: unknown {source!r}; built in: {', '.join(BUILT_IN)}")
    column = BUILT_IN[source].column
    if task.of_classes is None or task.inputs != column:
        fit = [other.name for other in TASKS.values() if other.of_classes is not None and other.inputs == column]
        raise DataError(
            f"data.source: {source} has {column}s with classes, which do not fit the task {task.name}; use it with "
            f"{' or '.join(fit)}"
        )
    taken: Dataset = task.of_classes(BUILT_IN[source].make())
    return taken


def stdlib_docstrings() -> Dataset:
    """Real labelled text that every machine has: docstrings of the running Python's standard library, by package.

    Those of at least 20 characters, without duplicates, in order of file and line. Sources are parsed, never imported,
    so nothing runs and the result depends only on the interpreter's files.

    Raises:
        DataError: the interpreter's standard library has no readable sources (a zipped or stripped installation).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: list[str] = []
    labels: list[int] = []
    seen: set[str] = set()
    for label, package in enumerate(PACKAGES):
        for path in sorted((root / package).rglob("*.py")):
            for text in docstrings_of(path.read_text(encoding="utf-8")):
                if len(text) >= MIN_CHARACTERS and text not in seen:
                    seen.add(text)
                    texts.append(text)
                    labels.append(label)
    if len(set(labels)) < len(PACKAGES):
        missing = [name for label, name in enumerate(PACKAGES) if label not in set(labels)]
        raise DataError(
            f"data.source: builtin:stdlib-docstrings found no docstrings of {', '.join(missing)} under {root}; this "
            "Python has no readable standard library sources; give a .jsonl or .csv file instead"
        )
    return Dataset({"text": tuple(texts)}, tuple(labels), PACKAGES, "docstrings of the Python standard library")


def docstrings_of(source: str) -> list[str]:
    """Docstrings of the module and of its classes and functions, cleaned of indentation, in source order."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in _statements(ast.parse(source)) if isinstance(node, documented)]
    found.sort(key=lambda node: getattr(node, "lineno", 0))
    docstrings = (ast.get_docstring(node, clean=False) for node in found)
    return [inspect.cleandoc(text) for text in docstrings if text]


def _statements(module: ast.Module) -> Iterator[ast.AST]:
    """The module and the statements in it, in the order of ``ast.walk``, which goes through every expression too."""
    waiting: deque[ast.AST] = deque([module])
    while waiting:
        node = waiting.popleft()
        yield node
        for field in BLOCKS:
            waiting.extend(getattr(node, field, ()))


def digits() -> Dataset:
    """Real labelled images that come with scikit-learn: 1,797 8 × 8 handwritten digits (Alpaydin & Kaynak 1998).

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise DataError("data.source: builtin:digits needs scikit-learn; run: pip install scikit-learn") from error
    found = load_digits()
    pixels = np.rint(found.images * (255 / BRIGHTEST)).astype(np.uint8)
    images = tuple(StoredImage(f"digit {index}", pixels=image) for index, image in enumerate(pixels))
    names = tuple(str(name) for name in found.target_names)
    return Dataset({"image": images}, tuple(map(int, found.target)), names, "handwritten digits of scikit-learn")


@dataclass(frozen=True)
class BuiltIn:
    """A data set that every machine has: how it is made, and the column that its samples with classes are made of."""

    make: Callable[[], Dataset]
    column: str


BUILT_IN = {
    f"{BUILT_IN_PREFIX}stdlib-docstrings": BuiltIn(stdlib_docstrings, "text"),
    f"{BUILT_IN_PREFIX}digits": BuiltIn(digits, "image"),
}
