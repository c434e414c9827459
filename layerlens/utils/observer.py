"""Observers of a job (telemetry, experiment trackers, the service), and how a job calls them.

``observing`` wraps a job, and ``observed_stage`` calls the observers at the beginning and the end of each stage. The
job does not know its observers. Only ``run_started`` may refuse a job, with a LayerLensError. If an observer raises
anything else, the job warns and does not call that observer again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

from layerlens.exceptions import LayerLensError

if TYPE_CHECKING:
    from layerlens.models.manifest import RunRecord


logger = logging.getLogger(__name__)


class RunObserver(Protocol):
    """An observer of jobs. The job calls these methods."""

    def run_started(self, kind: str, config: Any) -> None:
        """Called when a job begins. ``kind`` is "run", "optimize" ..., and ``config`` its ``RunConfig``."""

    def stage_started(self, name: str) -> None:
        """Called when a stage begins: load, profile, solve, export, check ..."""

    def stage_ended(self, name: str, seconds: float, error: BaseException | None) -> None:
        """Called when the stage ends, with ``error`` if it failed."""

    def run_ended(self, record: RunRecord | None, error: BaseException | None) -> None:
        """Called when the job ends, with its record, or with the error that ended it."""


class Observer:
    """A ``RunObserver`` that does nothing, as a base class."""

    def run_started(self, kind: str, config: Any) -> None:
        """See RunObserver."""

    def stage_started(self, name: str) -> None:
        """See RunObserver."""

    def stage_ended(self, name: str, seconds: float, error: BaseException | None) -> None:
        """See RunObserver."""

    def run_ended(self, record: RunRecord | None, error: BaseException | None) -> None:
        """See RunObserver."""


_watching: ContextVar[tuple[RunObserver, ...]] = ContextVar("layerlens_observers", default=())


@contextmanager
def watched_by(*observers: RunObserver) -> Iterator[None]:
    """Let these observers watch the jobs that start in the block, in addition to the configured ones."""
    token = _watching.set((*_watching.get(), *observers))
    try:
        yield
    finally:
        _watching.reset(token)


@contextmanager
def observing(kind: str, config: Any, observers: Sequence[RunObserver]) -> Iterator[Callable[[RunRecord], None]]:
    """Call ``observers``, and those of ``watched_by``, at the beginning, the stages and the end of a job.

    The job runs in the block, which calls the yielded function with the record of its result.

    Raises:
        LayerLensError: an observer refuses the job (a tracking server that cannot be reached), or the job's own.
    """
    alive = [*_watching.get(), *observers]
    token = _watching.set(())
    started: list[RunObserver] = []
    records: list[RunRecord] = []
    try:
        for observer in alive:
            try:
                observer.run_started(kind, config)
                started.append(observer)
            except LayerLensError:
                _tell(started, "run_ended", None, None)
                raise
            except Exception as error:
                _warn(observer, error)
        _watching.set(tuple(started))
        try:
            yield records.append
        except BaseException as error:
            _tell(_watching.get(), "run_ended", None, error)
            raise
        _tell(_watching.get(), "run_ended", records[0], None)
    finally:
        _watching.reset(token)


@contextmanager
def observed_stage(name: str) -> Iterator[None]:
    """Call the observers when the stage in the block begins and when it ends."""
    _tell(_watching.get(), "stage_started", name)
    start, failure = time.perf_counter(), None
    try:
        yield
    except BaseException as error:
        failure = error
        raise
    finally:
        _tell(_watching.get(), "stage_ended", name, time.perf_counter() - start, failure)


def _tell(observers: Sequence[RunObserver], event: str, *arguments: Any) -> None:
    for observer in observers:
        try:
            getattr(observer, event)(*arguments)
        except Exception as error:
            _warn(observer, error)
            _watching.set(tuple(other for other in _watching.get() if other is not observer))


def _warn(observer: RunObserver, error: Exception) -> None:
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    logger.warning("%s: %s; the run continues without it", type(observer).__name__, reason)
