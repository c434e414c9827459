"""What a model takes on this machine, measured: the time of a forward pass."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.utils.benchmark import Timer

TIMING_SECONDS = 0.5


def time_ms(work: Callable[[], object], *, seconds: float = TIMING_SECONDS) -> float:
    """Milliseconds that ``work`` takes, with the threads that torch is set to: the lower quartile of the runs.

    Other work on the machine only ever adds time, so the faster runs are nearer to what is needed.
    """
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    work()  # the first call allocates
    return 1e3 * float(np.quantile(timer.blocked_autorange(min_run_time=seconds).times, 0.25))


def forward_ms(model: torch.nn.Module, inputs: dict[str, torch.Tensor], *, seconds: float = TIMING_SECONDS) -> float:
    """Milliseconds of one forward pass without gradients."""

    def forward() -> None:
        with torch.no_grad():
            model(**inputs)

    return time_ms(forward, seconds=seconds)
