"""Errors that a user can act on. Each says what was wrong, what came, and what would work.

``exit_code`` is what the command line returns: 2 usage or configuration, 3 infeasible budgets, 4 model or data not
found; 1 is for what nobody foresaw.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

Self = TypeVar("Self", bound="LayerLensError")


class LayerLensError(Exception):
    """Base of every error that LayerLens raises on purpose.

    ``fault`` says what is wrong with a file (``layerlens.faults``); None where the error is about something else.
    """

    exit_code = 1
    fault: Enum | None = None

    def of(self: Self, fault: Enum) -> Self:
        """The error itself, with its fault."""
        self.fault = fault
        return self


class ConfigurationError(LayerLensError, ValueError):
    """A configuration value, key or file is wrong."""

    exit_code = 2


class ModelSpecError(LayerLensError, ValueError):
    """The description of the model is empty, contradictory or names an unknown layer."""

    exit_code = 2


class ModelNotFoundError(ModelSpecError):
    """The model is not where the configuration says."""

    exit_code = 4


class DataError(LayerLensError, ValueError):
    """The data is there but cannot be used (no usable column, no samples, too few classes)."""

    exit_code = 4


class DataNotFoundError(DataError):
    """The data is not where the configuration says."""

    exit_code = 4


class ActivationCacheError(LayerLensError, ValueError):
    """The per-layer statistics are missing, incomplete or not finite."""

    exit_code = 2


class ProfilingError(LayerLensError, RuntimeError):
    """The model could not be profiled (NaN in a statistic, a module that cannot be measured)."""


class ProcessLostError(LayerLensError, RuntimeError):
    """Another process of the same run failed or is lost.

    Args:
        message: which one and why.
        exit_code: that of the process that failed.
        told: whether the process that failed has told everybody, itself included.
    """

    def __init__(self, message: str, exit_code: int = 1, *, told: bool = False) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.told = told


class OptimizationError(LayerLensError, RuntimeError):
    """The allocation problem could not be solved."""


class InfeasibleError(OptimizationError):
    """No allocation, or only the empty one, fits the budgets; the message has the smallest budgets that would do.

    ``smallest`` has those by resource, unrounded and each alone where one alone is enough; empty where none is known.
    """

    exit_code = 3

    def __init__(self, message: str, smallest: Mapping[str, float] | None = None) -> None:
        super().__init__(message)
        self.smallest = dict(smallest or {})


class ManifestError(LayerLensError, ValueError):
    """A manifest cannot be written, read or applied."""

    exit_code = 2


class TrainingError(LayerLensError, RuntimeError):
    """Fine-tuning cannot go on (a loss that is not finite), or its checkpoints belong to another job."""


class SweepError(LayerLensError, ValueError):
    """A task of a sweep that is not in the list, options that do not go together, or tasks that failed."""

    exit_code = 2


class OutputError(LayerLensError, OSError):
    """The output directory or the cache cannot be written."""

    exit_code = 2


class StorageError(LayerLensError, OSError):
    """An object of a store (s3://, gs://, az:// ...) is missing, cannot be read, or does not match its checksum."""

    exit_code = 4


class ServiceError(LayerLensError, RuntimeError):
    """The LayerLens server cannot be reached, or refused a request."""


class TrackingError(LayerLensError, RuntimeError):
    """An experiment tracker cannot be reached or refused what it was told."""
