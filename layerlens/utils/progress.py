"""What a job shows while it runs: the progress of its stages, and the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Says that ``steps`` more steps of the stage are done, and perhaps what came of them (``loss 0.53``)."""

    def __call__(self, steps: int = 1, /, note: str = "") -> None: ...


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


def _no_steps(steps: int = 1, /, note: str = "") -> None:
    """Count nothing."""


silent: Progress = _Silent()


NAME = "layerlens"
logging.getLogger(NAME).addHandler(logging.NullHandler())


def show_logs(handler: logging.Handler, level: int = logging.DEBUG) -> None:
    """Send what LayerLens logs from ``level`` on to ``handler``; the handler of an earlier call is replaced."""
    logger = logging.getLogger(NAME)
    for old in [old for old in logger.handlers if not isinstance(old, logging.NullHandler)]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(level)
