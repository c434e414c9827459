"""Real labelled text that every machine has: docstrings of the running Python's standard library.

The label is the package a docstring comes from. Sources are parsed, never imported, so nothing runs and the result
depends only on the interpreter's files.
"""

from __future__ import annotations

import ast
import inspect
import sysconfig
from pathlib import Path

from layerlens.data.dataset import Dataset
from layerlens.exceptions import DataError

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


def stdlib_docstrings() -> Dataset:
    """Docstrings of at least 20 characters of the packages above, without duplicates, in order of file and line.

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
            "Python has no readable standard library sources, give a .jsonl or .csv file instead"
        )
    return Dataset({"text": tuple(texts)}, tuple(labels), PACKAGES, "docstrings of the Python standard library")


def docstrings_of(source: str) -> list[str]:
    """Docstrings of the module and of its classes and functions, cleaned of indentation, in source order."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    found.sort(key=lambda node: getattr(node, "lineno", 0))
    docstrings = (ast.get_docstring(node, clean=False) for node in found)
    return [inspect.cleandoc(text) for text in docstrings if text]
