"""Which files data may name: everything, unless whoever runs a job of others says otherwise (the service does).

Where data are looked for is checked before a job begins; a table or a data set's description can name further files,
which is only known when they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from layerlens.exceptions import DataError

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
