"""Real text that any machine with Python and its headers has: sources, documentation prose, C headers, docstrings."""

from __future__ import annotations

import ast
import hashlib
import importlib
import sysconfig
from pathlib import Path

LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "ensurepip", "__pycache__"}
MAX_FILE_CHARACTERS = 60_000


def python_sources() -> list[str]:
    """Sources of the standard library, without its tests and without the prose of pydoc_data."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(root.rglob("*.py")) if not LEFT_OUT & set(path.relative_to(root).parts)]
    return [path.read_text(encoding="utf-8", errors="ignore")[:MAX_FILE_CHARACTERS] for path in paths]


def c_headers() -> list[str]:
    """The headers of CPython's C interface.

    Raises:
        FileNotFoundError: this Python came without its headers.
    """
    root = Path(sysconfig.get_paths()["include"])
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(root.rglob("*.h"))]
    if not texts:
        raise FileNotFoundError(f"no C headers under {root}; install the development package of this Python")
    return [text[:MAX_FILE_CHARACTERS] for text in texts]


def documentation_prose() -> list[str]:
    """The language reference that Python's help() shows, one text for each topic."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return [topics[name] for name in sorted(topics)]


def documented_functions() -> list[tuple[str, str]]:
    """(first sentence of the docstring, source that follows it) of standard-library functions, without duplicates."""
    found: dict[str, str] = {}
    for source in python_sources():
        try:
            tree = ast.parse(source)
        except SyntaxError:  # cut off at MAX_FILE_CHARACTERS
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
                continue
            docstring = ast.get_docstring(node)
            if docstring is None:
                continue
            summary = " ".join(docstring.split("\n\n")[0].split())
            body = ast.unparse(ast.Module(node.body[1:], []))
            if 20 <= len(summary) <= 200 and len(body) >= 40:
                found.setdefault(summary, " ".join(body.split())[:400])
    return list(found.items())


def by_hash(texts: list[str], salt: str) -> list[int]:
    """Indices of ``texts`` in an order drawn from their content."""
    keyed = [hashlib.sha256(f"{salt}:{text}".encode()).digest() for text in texts]
    return sorted(range(len(texts)), key=lambda index: keyed[index])
