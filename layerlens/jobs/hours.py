"""``training.max_train_hours`` as a budget of one training step."""

from __future__ import annotations

from typing import Any

from layerlens.config import RunConfig
from layerlens.exceptions import ConfigurationError
from layerlens.models import ModelStatistics
from layerlens.tuning.fine_tune import total_steps

SAMPLES = "training_samples"
"""In the provenance of statistics: samples that a training would have."""
HOUR_MS = 3.6e6


def with_hours(config: RunConfig, statistics: ModelStatistics) -> RunConfig:
    """The configuration with ``optimization.max_step_ms`` no larger than the hours allow.

    Hours are those of all optimiser steps. A step of another batch than the latency profile's counts in proportion.

    Raises:
        ConfigurationError: it is not known how many steps there are.
    """
    training, optimization = config.training, config.optimization
    if training.max_train_hours is None:
        return config
    provenance: dict[str, Any] = statistics.provenance
    samples = provenance.get(SAMPLES)
    if training.max_steps is None and samples is None:
        raise ConfigurationError(
            "training.max_train_hours: the statistics do not say how many training samples there are; give "
            "training.max_steps, or measure with this version of `layerlens run`"
        )
    samples = min(int(samples or 0), training.train_samples or int(samples or 0))
    batches = total_steps(samples, training) * training.gradient_accumulation
    share = training.batch_size / optimization.latency_profile.batch_size
    budget = training.max_train_hours * HOUR_MS / (max(1, batches) * share)
    if optimization.max_step_ms is not None:
        budget = min(budget, optimization.max_step_ms)
    return config.model_copy(update={"optimization": optimization.model_copy(update={"max_step_ms": budget})})
