"""Activation memory, FLOPs and time of every module of the frozen model, each measured only when it is asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from layerlens.models import ModuleCosts
from layerlens.profiling.footprint import opened_at, samples_in, saved_tensors_seen
from layerlens.profiling.request import StatisticsRequest

PASSES = 3
"""Timed passes; other work on the machine only ever adds time, so the least of them counts."""


def module_costs(
    model: torch.nn.Module, first_block: str | None, inputs: dict[str, torch.Tensor], request: StatisticsRequest
) -> dict[str, ModuleCosts]:
    """Costs of every module that is called, by name, each with everything inside it.

    Args:
        model: frozen, in evaluation mode.
        first_block: where the backward pass reaches down to (see ``frozen_footprint``).
        inputs: a full batch; bytes and FLOPs are those of one of its tokens, or samples where there are none.
        request: which costs.
    """
    if not (request.activation_memory or request.flops or request.time):
        return {}
    count = samples_in(inputs)
    kept = _activation_bytes(model, first_block, inputs) if request.activation_memory else {}
    flops = _flops(model, inputs) if request.flops else {}
    times = _times(model, inputs) if request.time else {}
    called = [name for name, _ in model.named_modules() if name and (name in kept or name in flops or name in times)]
    return {
        name: ModuleCosts(
            activation_bytes=kept[name] / count if name in kept else None,
            forward_flops=flops.get(name, 0) / count if request.flops else None,
            forward_ms=1e3 * times[name] if name in times else None,
        )
        for name in called
    }


def _activation_bytes(
    model: torch.nn.Module, first_block: str | None, inputs: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Bytes that each module is the first to keep, every storage counted once."""
    running: list[str] = []
    kept: dict[str, float] = {}

    def enter(name: str) -> None:
        running.append(name)
        kept.setdefault(name, 0.0)

    def seen(size: int) -> None:
        for name in set(running):
            kept[name] += size

    with _entered(model, enter, lambda name: running.pop()), opened_at(model, first_block, inputs) as run:
        saved_tensors_seen(model, run, seen)
    return kept


def _flops(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, int]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    root = type(model).__name__ + "."
    counts = {name: sum(of.values()) for name, of in counter.get_flop_counts().items()}
    return {name.removeprefix(root): int(found) for name, found in counts.items() if name.startswith(root)}


def _times(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Seconds of one forward pass of each module, all its calls together."""
    on_gpu = any(tensor.device.type == "cuda" for tensor in inputs.values())

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    best: dict[str, float] = {}
    for warm in range(PASSES + 1):
        starts: dict[str, list[float]] = {}
        spent: dict[str, float] = {}

        def enter(name: str, starts: dict[str, list[float]] = starts) -> None:
            starts.setdefault(name, []).append(now())

        def leave(name: str, starts: dict[str, list[float]] = starts, spent: dict[str, float] = spent) -> None:
            spent[name] = spent.get(name, 0.0) + now() - starts[name].pop()

        with torch.no_grad(), _entered(model, enter, leave):
            model(**inputs)
        if warm:  # the first pass allocates
            best = {name: min(seconds, best.get(name, seconds)) for name, seconds in spent.items()}
    return best


@contextmanager
def _entered(model: torch.nn.Module, enter: Callable[[str], None], leave: Callable[[str], Any]) -> Iterator[None]:
    """While open, ``enter`` and ``leave`` are told of every call of every module below ``model``."""
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                before = module.register_forward_pre_hook(lambda *_, name=name: enter(name))
                after = module.register_forward_hook(lambda *_, name=name: leave(name) and None, always_call=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
        yield
