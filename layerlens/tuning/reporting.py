"""``training.report_to``: transformers' own reporting callbacks (W&B, MLflow, TensorBoard ...) around a training.

The environment variables of each tool say where it sends what it is told, as in any other training of transformers. A
callback that cannot begin refuses the training. One that fails later is a warning, and the training goes on without it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from layerlens.config import TrackingConfig, TrainingConfig
from layerlens.exceptions import ConfigurationError, TrackingError
from layerlens.storage.filesystem import redacted

ALL = "all"
FIELD = "training.report_to"


@dataclass(frozen=True)
class Reports:
    """Whom a training is reported to.

    Args:
        names: as transformers names them; empty: nobody.
        every: optimiser steps between two reports of the training loss.
        project: project or experiment that the run belongs to.
        run_name: name of the run; the tool's own choice when None.
        uri: MLflow's server, where the environment names none.
    """

    names: tuple[str, ...] = ()
    every: int = 1
    project: str = "layerlens"
    run_name: str | None = None
    uri: str | None = None

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables that hold during the training, where the user has not set them."""
        found = {
            "WANDB_PROJECT": self.project,
            "WANDB_CONSOLE": "off",  # what the terminal shows is not sent
            "MLFLOW_EXPERIMENT_NAME": self.project,
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # by default minutes go by until a server is given up
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        }
        return found if self.uri is None else {**found, "MLFLOW_TRACKING_URI": self.uri}


def reports_of(training: TrainingConfig, tracking: TrackingConfig | None = None) -> Reports:
    """Whom a configuration wants a training to be reported to.

    Raises:
        ConfigurationError: see ``reporting_names``.
    """
    names, named = reporting_names(training.report_to), tracking or TrackingConfig()
    return Reports(names, training.report_every, named.experiment, named.run_name, named.uri)


def reporting_names(asked: Sequence[str]) -> tuple[str, ...]:
    """The callbacks that ``training.report_to`` names, each once.

    Raises:
        ConfigurationError: transformers has no such callback, or the package that it needs is not installed.
    """
    if not asked:
        return ()
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    installed = get_available_reporting_integrations()
    if list(asked) == [ALL]:
        return tuple(installed)
    for name in asked:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ConfigurationError(f"{FIELD}: got {name!r}; give {known}, or all or none alone")
        if name not in installed:
            raise ConfigurationError(
                f"{FIELD}: {name} needs a package that is not installed; install it, or leave {name} out"
            )
    return tuple(dict.fromkeys(asked))


def callbacks_of(reports: Reports, tell: Callable[[str], None]) -> list[Any]:
    """One callback for each name.

    Raises:
        TrackingError: one cannot be made.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    made = []
    for name in reports.names:
        (kind,) = get_reporting_integration_callbacks([name])
        try:
            made.append(Reporter(name, kind(), tell))
        except Exception as error:
            raise _cannot_begin(name, error) from error
    return made


class Reporter:
    """A callback of transformers that cannot end a training once it has begun."""

    def __init__(self, name: str, callback: Any, tell: Callable[[str], None]) -> None:
        self.name, self.callback, self.tell = name, callback, tell
        self.alive = True

    def __getattr__(self, event: str) -> Any:
        """The handler of an event; Trainer calls each by its name."""
        if not event.startswith("on_"):
            raise AttributeError(event)
        handler = getattr(self.callback, event)

        def guarded(*arguments: Any, **keywords: Any) -> Any:
            if not self.alive:
                return None
            try:
                return handler(*arguments, **keywords)
            except Exception as error:
                if event == "on_train_begin":
                    raise _cannot_begin(self.name, error) from error
                self.alive = False
                self.tell(f"{FIELD}: {self.name} failed ({_words(error)}); the training goes on without it")
            return None

        return guarded


@contextmanager
def reporting(reports: Reports) -> Iterator[None]:
    """What holds around a training: the tools' variables, and the end of a run of W&B's that it began."""
    if not reports.names:
        yield
        return
    added = {name: value for name, value in reports.variables.items() if name not in os.environ}
    os.environ.update(added)
    before = _wandb_run()
    try:
        yield
    except BaseException as error:
        _end_wandb_run(before, 1 if isinstance(error, Exception) else 255)  # failed, or killed
        raise
    else:
        _end_wandb_run(before, 0)
    finally:
        for name in added:
            os.environ.pop(name, None)


def _wandb_run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)


def _end_wandb_run(before: Any, exit_code: int) -> None:
    """transformers leaves the run open for the program's own figures; of ``layerlens train`` there are no more."""
    if _wandb_run() is not None and _wandb_run() is not before:
        sys.modules["wandb"].finish(exit_code=exit_code)


def _cannot_begin(name: str, error: Exception) -> TrackingError:
    return TrackingError(f"{FIELD}: {name} cannot be used ({_words(error)}); set it up, or leave it out")


def _words(error: Exception) -> str:
    return redacted(" ".join(str(error).split()) or type(error).__name__)[:300]
