"""``training.max_train_hours`` as a budget of one training step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from layerlens.config import RunConfig
from layerlens.exceptions import ConfigurationError, InfeasibleError
from layerlens.models import ModelStatistics
from layerlens.tuning.steps import total_steps

SAMPLES = "training_samples"
"""In the provenance of statistics: samples that a training would have."""
HOUR_MS = 3.6e6
STEP = "step_ms"


def with_hours(config: RunConfig, statistics: ModelStatistics) -> RunConfig:
    """The configuration with ``optimization.max_step_ms`` no larger than the hours allow.

    Hours are those of all optimiser steps. A step of another batch than the latency profile's counts in proportion.

    Raises:
        ConfigurationError: it is not known how many steps there are.
    """
    hours, optimization = config.training.max_train_hours, config.optimization
    if hours is None:
        return config
    budget = hours * HOUR_MS / _steps(config, statistics)
    if optimization.max_step_ms is not None:
        budget = min(budget, optimization.max_step_ms)
    return config.model_copy(update={"optimization": optimization.model_copy(update={"max_step_ms": budget})})


@contextmanager
def told_in_hours(config: RunConfig, statistics: ModelStatistics) -> Iterator[None]:
    """While open, what is infeasible because of the hours says so, in hours.

    Args:
        config: as the user gave it, before ``with_hours``.
        statistics: of the model.
    """
    try:
        yield
    except InfeasibleError as error:
        hours, own = config.training.max_train_hours, config.optimization.max_step_ms
        if hours is None or STEP not in error.smallest:
            raise
        steps = _steps(config, statistics)
        if own is not None and own <= hours * HOUR_MS / steps:
            raise
        needed = error.smallest[STEP] * steps / HOUR_MS
        raise InfeasibleError(
            f"training.max_train_hours: {hours:g} h are too few, at least {needed * (1.0 + 5e-7):.6g} h are needed: "
            f"optimization.max_step_ms follows from it ({hours * HOUR_MS / steps:.6g}). {error}",
            error.smallest,
        ) from error


def _steps(config: RunConfig, statistics: ModelStatistics) -> float:
    """Steps of a training, each of the latency profile's batch."""
    training, provenance = config.training, statistics.provenance
    samples: Any = provenance.get(SAMPLES)
    if training.max_steps is None and samples is None:
        raise ConfigurationError(
            "training.max_train_hours: the statistics do not say how many training samples there are; give "
            "training.max_steps, or measure with this version of `layerlens run`"
        )
    samples = min(int(samples or 0), training.train_samples or int(samples or 0))
    batches = total_steps(samples, training) * training.gradient_accumulation
    return max(1, batches) * training.batch_size / config.optimization.latency_profile.batch_size
