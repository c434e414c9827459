"""The errors that LayerLens raises. Each message names the field, what is wrong, what LayerLens got, and what works.

The command line exits with the error's ``exit_code``: 2 for usage or configuration, 3 for infeasible budgets, 4 if the
model or data is not found, and 1 for everything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

Self = TypeVar("Self", bound="LayerLensError")


class LayerLensError(Exception):
    """Base class of every error that LayerLens raises on purpose.

    Attributes:
        exit_code: exit code of the command line.
        fault: what is wrong with a file, as a member of an enum in ``layerlens.faults``; None if the error is not about
            a file.
    """

    exit_code = 1
    fault: Enum | None = None

    def of(self: Self, fault: Enum) -> Self:
        """Set ``fault`` and return the error itself."""
        self.fault = fault
        return self


class ConfigurationError(LayerLensError, ValueError):
    """A configuration key, value or file, or an argument, is wrong."""

    exit_code = 2


class ModelSpecError(LayerLensError, ValueError):
    """The model specification is empty or contradictory, or names an unknown layer."""

    exit_code = 2


class ModelNotFoundError(ModelSpecError):
    """The configured model does not exist or cannot be read."""

    exit_code = 4


class DataError(LayerLensError, ValueError):
    """The data exists but cannot be used: no usable column, no samples, or too few classes."""

    exit_code = 4


class DataNotFoundError(DataError):
    """The configured data does not exist."""

    exit_code = 4


class ActivationCacheError(LayerLensError, ValueError):
    """The per-layer statistics are missing, incomplete or not finite."""

    exit_code = 2


class ProfilingError(LayerLensError, RuntimeError):
    """The model could not be profiled: a statistic is NaN, or a module cannot be measured."""


class ProcessLostError(LayerLensError, RuntimeError):
    """Another process of the same run failed or stopped responding.

    Args:
        message: which process, and why.
        exit_code: exit code of the failed process.
        told: whether the failed process has already reported its error to all processes.
    """

    def __init__(self, message: str, exit_code: int = 1, *, told: bool = False) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.told = told


class OptimizationError(LayerLensError, RuntimeError):
    """The allocation problem could not be solved."""


class InfeasibleError(OptimizationError):
    """No allocation, or only the empty one, fits the budgets. The message gives the smallest budgets that work.

    Attributes:
        smallest: resource -> smallest budget that works, not rounded. If raising one budget is enough, each entry is
            the amount for that budget alone. Empty if LayerLens does not know them.
    """

    exit_code = 3

    def __init__(self, message: str, smallest: Mapping[str, float] | None = None) -> None:
        super().__init__(message)
        self.smallest = dict(smallest or {})


class ManifestError(LayerLensError, ValueError):
    """A manifest cannot be written, read or applied."""

    exit_code = 2


class TrainingError(LayerLensError, RuntimeError):
    """Fine-tuning cannot continue because a loss is not finite, or the checkpoints belong to another job."""


class SweepError(LayerLensError, ValueError):
    """A sweep has no such task, its options contradict each other, or some of its tasks failed."""

    exit_code = 2


class OutputError(LayerLensError, OSError):
    """The output directory or the cache cannot be written."""

    exit_code = 2


class StorageError(LayerLensError, OSError):
    """An object in a store (s3://, gs://, az:// ...) is missing, cannot be read, or does not match its checksum."""

    exit_code = 4


class ServiceError(LayerLensError, RuntimeError):
    """The LayerLens server cannot be reached, or refused the request."""


class TrackingError(LayerLensError, RuntimeError):
    """An experiment tracker cannot be reached, or refused the data."""
