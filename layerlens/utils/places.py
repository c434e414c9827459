"""Where LayerLens keeps things on this machine, and which files it may read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from layerlens.exceptions import DataError


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
