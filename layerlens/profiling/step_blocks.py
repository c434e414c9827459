"""Blocks whose activations can be checkpointed, in a recorded step: where each call begins and ends, and what goes in.

A checkpointed block keeps what goes into it. Its backward pass runs it again first, as far as something inside is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from layerlens.profiling.step_calls import ForwardRecorder
from layerlens.profiling.step_timeline import BackwardStep


@dataclass
class BlockCall:
    """One call: the block's number, its operations, and the storages that it was given."""

    block: int
    first: int
    after: int = -1
    given: set[int] = field(default_factory=set)


@contextmanager
def watched_blocks(
    blocks: Mapping[str, torch.nn.Module], forward: ForwardRecorder, calls: list[BlockCall]
) -> Iterator[None]:
    """Note every call of the blocks."""
    handles = []
    for number, module in enumerate(blocks.values()):

        def before(_: Any, args: Any, kwargs: Any, number: int = number) -> None:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            given = {forward.number(tensor) for tensor in tensors} - forward.fixed
            calls.append(BlockCall(number, len(forward.calls), given=given))

        def after(_: Any, __: Any, ___: Any, number: int = number) -> None:
            open_ones = [call for call in calls if call.block == number and call.after < 0]
            open_ones[-1].after = len(forward.calls)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def block_arrays(
    calls: Sequence[BlockCall], forward: ForwardRecorder, steps: Sequence[BackwardStep], number: Mapping[int, int]
) -> dict[str, np.ndarray]:
    """The arrays of ``StepRecord`` about blocks; ``number`` has the places of the storages on the axis s."""
    spans = [(call.first, call.after, _computed_again(call, steps)) for call in calls]
    inputs = [(place, number[storage]) for place, call in enumerate(calls) for storage in sorted(call.given)]
    n_calls = len(forward.calls)
    around = np.zeros(n_calls)
    born = np.array([min(at, n_calls) for at in forward.born], dtype=np.int64)
    died = np.array([min(forward.died.get(storage, n_calls), n_calls) for storage in range(len(born))], dtype=np.int64)
    n_bytes = np.array(forward.n_bytes, dtype=np.float64)
    n_bytes[sorted(forward.fixed)] = 0.0
    for first, after, _ in spans:
        there = (born < first) & (died > first)
        gone = np.bincount(np.minimum(died[there], after) - first, weights=n_bytes[there], minlength=after - first + 1)
        around[first:after] = n_bytes[there].sum() - np.cumsum(gone)[: after - first]
    return {
        "block_call__g": np.array([call.block for call in calls], dtype=np.int32),
        "block_span__gt": np.array(spans, dtype=np.int32).reshape(-1, 3),
        "block_input__ns": np.array(inputs, dtype=np.int32).reshape(-1, 2),
        "around__bf": around,
    }


def _computed_again(call: BlockCall, steps: Sequence[BackwardStep]) -> int:
    """torch stops as soon as all that is kept was computed: before the operation that only keeps what goes into it."""
    end = call.first
    for step in steps:
        if call.first <= step.at < call.after and step.backward.kept:
            end = max(end, step.at + any(name != "leaf" for name, _ in step.backward.kept))
    return end
