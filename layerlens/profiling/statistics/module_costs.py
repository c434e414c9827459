"""Activation memory, FLOPs and time of every module of the frozen model, each with everything inside it.

Bytes and FLOPs are those of one token of a full batch, or of one sample where there are no tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from layerlens.integrations.expert_products import plain_products
from layerlens.integrations.flops import FlopCounter
from layerlens.profiling.footprint import opened_at, samples_in, saved_tensors_seen
from layerlens.profiling.statistics import Statistic

PASSES = 3
"""Timed passes; other work on the machine only ever adds time, so the least of them counts."""


def _activation_bytes(
    model: torch.nn.Module, first_block: str | None, inputs: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Bytes per token that each module is the first to keep for a backward pass, every storage counted once."""
    running: list[str] = []
    kept: dict[str, float] = {}

    def enter(name: str) -> None:
        running.append(name)
        kept.setdefault(name, 0.0)

    def seen(size: int) -> None:
        for name in set(running):
            kept[name] += size

    with (
        plain_products(model),
        _entered(model, enter, lambda name: running.pop()),
        opened_at(model, first_block, inputs) as run,
    ):
        saved_tensors_seen(model, run, seen)
    count = samples_in(inputs)
    return {name: size / count for name, size in kept.items()}


def _forward_flops(
    model: torch.nn.Module, first_block: str | None, inputs: dict[str, torch.Tensor]
) -> dict[str, float]:
    with torch.no_grad(), plain_products(model), FlopCounter(model) as counter:
        model(**inputs)
    root = type(model).__name__ + "."
    counts = {name: sum(of.values()) for name, of in counter.get_flop_counts().items()}
    tokens = samples_in(inputs)
    return {name.removeprefix(root): flops / tokens for name, flops in counts.items() if name.startswith(root)}


def _forward_ms(model: torch.nn.Module, first_block: str | None, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Milliseconds of one forward pass of each module, all its calls together."""
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
    return {name: 1e3 * seconds for name, seconds in best.items()}


@contextmanager
def _entered(model: torch.nn.Module, enter: Callable[[str], None], leave: Callable[[str], Any]) -> Iterator[None]:
    """While open, ``enter`` and ``leave`` are called around every call of every module below ``model``."""
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                before = module.register_forward_pre_hook(lambda *_, name=name: enter(name))
                after = module.register_forward_hook(lambda *_, name=name: leave(name) and None, always_call=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
        yield


ACTIVATION_MEMORY = Statistic(
    "activation_memory", module_values=_activation_bytes, fields=("activation_bytes",), steady=True
)
FLOPS = Statistic("flops", module_values=_forward_flops, module_absent=0.0, fields=("forward_flops",), steady=True)
TIME = Statistic("time", module_values=_forward_ms, fields=("forward_ms",), steady=True)
