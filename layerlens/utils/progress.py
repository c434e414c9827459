"""How a stage reports that it advances, without knowing whether anyone looks.

The command line shows bars; libraries and tests pass ``silent``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Says that ``steps`` more steps of the stage are done."""

    def __call__(self, steps: int = 1, /) -> None: ...


class Progress(Protocol):
    """What every stage is given.

    ``with progress.stage("Measuring gradients", total=16) as advance: ... advance(1)``
    """

    def stage(self, description: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """Open a stage of ``total`` steps (None: not known); it ends with the block, also by an exception."""
        ...


class _Silent:
    """Progress that shows nothing."""

    @contextmanager
    def stage(self, description: str, total: int | None = None) -> Iterator[Advance]:
        yield _no_steps


def _no_steps(steps: int = 1, /) -> None:
    """Count nothing."""


silent: Progress = _Silent()
