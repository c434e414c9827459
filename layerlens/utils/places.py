"""Where LayerLens keeps things on this machine, and which files it may read."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from pathlib import Path

from layerlens.exceptions import DataError

MOST_NAMES = 10_000
"""Names of a folder that are compared with one that is missing."""


def default_cache_dir() -> Path:
    """$LAYERLENS_CACHE, or ``layerlens`` in the user's cache directory."""
    if "LAYERLENS_CACHE" in os.environ:
        return Path(os.environ["LAYERLENS_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "layerlens"


_roots: ContextVar[tuple[Path, ...] | None] = ContextVar("layerlens_readable", default=None)


@contextmanager
def readable_below(roots: Sequence[Path]) -> Iterator[None]:
    """Files that data name must lie below ``roots`` in the block, links followed."""
    token = _roots.set(tuple(root.resolve() for root in roots))
    try:
        yield
    finally:
        _roots.reset(token)


def check_readable(path: Path, place: Path) -> None:
    """Refuse ``path``, which the data at ``place`` name, if it leads out of where data may lie.

    Raises:
        DataError: it does.
    """
    roots = _roots.get()
    if roots is not None and not any(path.resolve().is_relative_to(root) for root in roots):
        raise DataError(f"data.source: {place.name} names a file that is not below a root of this server")


def did_you_mean(missing: Path) -> str:
    """A hint with the name beside ``missing`` that is nearest to its own; "" if none is near."""
    roots, folder = _roots.get(), missing.parent
    try:
        if roots is not None and not any(folder.resolve().is_relative_to(root) for root in roots):
            return ""
        names = [entry.name for entry in islice(folder.iterdir(), MOST_NAMES)]
    except OSError:
        return ""
    nearest = difflib.get_close_matches(missing.name, names, n=1, cutoff=0.75)
    return f"; did you mean {nearest[0]}?" if nearest and nearest[0] != missing.name else ""
