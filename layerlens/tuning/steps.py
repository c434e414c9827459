"""How many optimiser steps a training has; needs no torch, so that a choice within hours needs none."""

from __future__ import annotations

import math

from layerlens.config import TrainingConfig


def total_steps(samples: int, config: TrainingConfig, processes: int = 1) -> int:
    """Optimiser steps that ``fine_tune`` will take on so many training samples."""
    if config.max_steps is not None:
        return config.max_steps
    return math.ceil(config.epochs * steps_per_epoch(samples, config, processes))


def steps_per_epoch(samples: int, config: TrainingConfig, processes: int = 1) -> int:
    """Optimiser steps in one pass over so many samples."""
    batches = math.ceil(samples / (config.batch_size * processes))
    return max(1, math.ceil(batches / config.gradient_accumulation))
