"""What is alive at each operation of a recorded step: in the forward pass, and in the backward pass through all of it.

Both follow from the operations of the forward pass: the backward pass goes through them from the last to the first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from layerlens.profiling.step_calls import BackwardOf, ForwardRecorder, RecordedCall


@dataclass(frozen=True)
class BackwardStep:
    """An operation that gradients go through.

    Args:
        call: the operation.
        active: places of its arguments that have a gradient.
        backward: what autograd says of it.
        kept: storages that it keeps.
        at: its place in the forward pass.
        cause: the layers for whose sake it runs.
    """

    call: RecordedCall
    active: tuple[int, ...]
    backward: BackwardOf
    kept: tuple[int, ...]
    at: int
    cause: int


def forward_timeline(forward: ForwardRecorder) -> np.ndarray:
    """float64 [operations]: bytes alive at each of them, and those that it has for itself; the weights are left out."""
    n_calls = len(forward.calls)
    change = np.zeros(n_calls + 1)
    for number, n_bytes in enumerate(forward.n_bytes):
        if number not in forward.fixed:
            change[min(forward.born[number], n_calls)] += n_bytes
            change[min(forward.died.get(number, n_calls), n_calls)] -= n_bytes
    workspace = np.array([call.workspace for call in forward.calls], dtype=np.float64)
    return np.cumsum(change)[:n_calls] + workspace


def last_readers(steps: Sequence[BackwardStep]) -> dict[int, int]:
    """Storage -> the lowest operation whose backward pass reads it: it is let go after that."""
    found: dict[int, int] = {}
    for step in steps:
        for storage in step.kept:
            found[storage] = min(step.at, found.get(storage, step.at))
    return found


def backward_timeline(steps: Sequence[BackwardStep], n_calls: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """(gradients alive when the backward pass comes to each operation, most bytes that it has beside them, its cause).

    Gradients of one tensor from several operations are added up in place, where nothing else reads the first of them.
    """
    held, passing, causes = np.full(n_calls, np.nan), np.zeros(n_calls), [0] * n_calls
    buffers: dict[int, int] = {}  # number of a gradient's memory -> bytes
    gradient: dict[int, int] = {}  # storage -> number of its gradient's memory
    users: dict[int, int] = defaultdict(int)
    fresh = 0
    for step in reversed(steps):
        results = {step.call.results[place].storage for place in step.backward.needs_grad}
        for storage in results:
            if storage not in gradient:  # of the loss
                fresh += 1
                gradient[storage], buffers[fresh] = fresh, 0
                users[fresh] += 1
        held[step.at], passing[step.at], causes[step.at] = sum(buffers.values()), step.backward.peak, step.cause
        inputs = {step.call.leaves[place].storage for place in step.active}
        arriving = next(iter(results))
        for place, size in step.backward.gradients.items():
            storage = step.call.leaves[place].storage
            if storage in results:
                if size is not None:  # a view of a part: the gradient of the whole is another block
                    fresh += 1
                    users[gradient[storage]] -= 1
                    gradient[storage], buffers[fresh] = fresh, size
                    users[fresh] += 1
                continue
            there = gradient.get(storage)
            if there is not None:
                if users[there] == 1 or size is None:
                    continue
                users[there] -= 1
            if size is None:
                gradient[storage] = gradient[arriving]
            else:
                fresh += 1
                gradient[storage], buffers[fresh] = fresh, size
            users[gradient[storage]] += 1
        for storage in results - inputs:
            users[gradient.pop(storage)] -= 1
        for number in [number for number in buffers if users[number] <= 0]:
            del buffers[number]
    return _filled(held, sum(buffers.values())), passing, causes


def _filled(held: np.ndarray, last: float) -> np.ndarray:
    """Operations without a backward pass have alive what the next lower one has."""
    below = last
    for at in range(len(held)):
        if np.isnan(held[at]):
            held[at] = below
        below = held[at]
    return held
