"""What a model takes on this machine, measured: time of a forward pass and of a training step, and its peak memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import numpy as np
import torch

from layerlens.integrations.allocations import peaks_of

TIMING_SECONDS = 0.5
SHORT = 1e-3
"""Calls of less than so many seconds are timed in blocks."""
TIME_SHARE = 1.0
"""All times of measuring are multiplied by it: less where nobody reads the figures, as in tests."""


def here(device_type: str) -> bool:
    """Whether what torch computes on is a device of this type ("cpu" or "gpu")."""
    return torch.cuda.is_available() == (device_type == "gpu")


def time_ms(
    work: Callable[[], object], *, seconds: float = TIMING_SECONDS, cpu_time: bool = False, warm: bool = False
) -> float:
    """Milliseconds that ``work`` takes, with the threads that torch is set to: the lower quartile of the runs.

    Other work on the machine only ever adds time, so the faster runs are nearer to what is needed.

    Args:
        work: called again and again.
        seconds: how long, on the clock that is used.
        cpu_time: count processor time instead of wall time. With one thread on a CPU that is what an idle machine
            would take, but for shared caches and memory; with several threads it is their sum.
        warm: whether it was called just before; else the first call, which allocates, does not count.
    """
    clock = time.process_time if cpu_time else _now
    if not warm:
        work()
    times = _each(work, clock, TIME_SHARE * seconds)
    if times[0] < SHORT:
        times = _in_blocks(work, clock, TIME_SHARE * seconds)
    return 1e3 * float(np.quantile(times, 0.25))


def _each(work: Callable[[], object], clock: Callable[[], float], seconds: float) -> list[float]:
    """Times of single calls, until so many seconds have passed; of one alone where that is short."""
    collects, times = gc.isenabled(), list[float]()
    gc.disable()
    try:
        while not times or (times[0] >= SHORT and sum(times) < seconds):
            start = clock()
            work()
            times.append(clock() - start)
    finally:
        if collects:
            gc.enable()
    return times


def _in_blocks(work: Callable[[], object], clock: Callable[[], float], seconds: float) -> list[float]:
    """Times of a call that is too short for the clock, in blocks of calls."""
    from torch.utils.benchmark import Timer  # slow to import

    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads(), timer=clock)
    return timer.blocked_autorange(min_run_time=seconds).times


def forward_ms(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], *, seconds: float = TIMING_SECONDS, warm: bool = False
) -> float:
    """Milliseconds of one forward pass without gradients."""

    def forward() -> None:
        with torch.no_grad():
            model(**inputs)

    return time_ms(forward, seconds=seconds, warm=warm)


def training_step(
    model: torch.nn.Module, loss: Callable[[], torch.Tensor], optimizer: str = "adamw"
) -> tuple[Callable[[], None], int]:
    """(a whole training step, bytes of its optimiser state); the learning rate is 0, so weights stay.

    Args:
        model: its parameters that require gradients are trained.
        loss: made anew in every step.
        optimizer: "adamw" or "sgd".
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    made = _optimizer(trained, optimizer)

    def step() -> None:
        made.zero_grad()
        loss().backward()
        made.step()

    return step, (2 if optimizer == "adamw" else 0) * sum(
        parameter.numel() * parameter.element_size() for parameter in trained
    )


def step_parts_ms(
    model: torch.nn.Module,
    loss: Callable[[], torch.Tensor],
    optimizer: str = "adamw",
    *,
    seconds: float = TIMING_SECONDS,
) -> dict[str, float]:
    """Milliseconds of a training step and of its parts, each the lower quartile of the same steps.

    Args:
        model: its parameters that require gradients are trained, with a learning rate of 0.
        loss: made anew in every step.
        optimizer: "adamw" or "sgd".
        seconds: how long steps are made, on the wall clock; at least three are.

    Returns:
        "forward_ms" (loss included), "backward_ms", "optimizer_ms", and "step_ms" of all of them.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    made = _optimizer(trained, optimizer)
    rows: list[tuple[float, ...]] = []
    begin = _now()
    while len(rows) < 4 or _now() - begin < TIME_SHARE * seconds:
        made.zero_grad()
        marks = [_now()]
        value = loss()
        marks.append(_now())
        value.backward()
        marks.append(_now())
        made.step()
        marks.append(_now())
        rows.append((*np.diff(marks), marks[-1] - marks[0]))
    low = 1e3 * np.quantile(np.array(rows[1:]), 0.25, axis=0)  # the first step allocates
    return dict(zip(("forward_ms", "backward_ms", "optimizer_ms", "step_ms"), low.tolist(), strict=True))


def _now() -> float:
    """Seconds, when everything that was asked of the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _optimizer(trained: list[torch.nn.Parameter], name: str) -> torch.optim.Optimizer:
    """An optimiser that leaves the weights as they are."""
    if name == "adamw":
        return torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)
    return torch.optim.SGD(trained, lr=0.0)


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes that torch had allocated at one time during ``work``, above what was there when it began.

    On a CPU from the allocator's own events (``torch.profiler``), on a GPU from its statistics: exact, whatever else
    runs on the machine.
    """
    return peaks_of([work])[0]
