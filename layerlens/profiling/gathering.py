"""The shares of several processes become one at process 0, once, at the end of the pass.

Sums of matrices are added by one reduction each. Everything that belongs to single samples or batches is sent as it is
and put into the order of the batches, so it has the bits that one process would have given it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from layerlens.integrations.placement import input_device
from layerlens.profiling.ledger import Ledger
from layerlens.profiling.pass_state import (
    PassState,
    add_empty,
    add_sum,
    add_to,
    state_from_bytes,
    state_of,
    state_to_bytes,
)
from layerlens.utils.processes import Processes

if TYPE_CHECKING:
    from layerlens.profiling.capture import Capture


def gather(capture: Capture, ledger: Ledger, processes: Processes) -> None:
    """Add the other processes' sums, rows and batches to those of process 0."""
    if processes.alone:
        return
    state = state_of(capture, ledger)
    facts = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.sums.items()}
    told = processes.everyone("sums", (state.inputs, state.matrices, facts))
    for inputs, matrices, _ in told:  # a layer that some samples do not reach (experts) is not known to everybody
        add_empty(capture, inputs, matrices)
    device = input_device(capture.model)
    everywhere = {name: fact for _, _, each in told for name, fact in each.items()}
    for name, (shape, dtype) in everywhere.items():
        if name not in facts:
            add_sum(capture, name, torch.zeros(shape, dtype=dtype, device=device))
    state = state_of(capture, ledger)
    for name in everywhere:
        if capture.shards is None or not name.startswith("mean "):
            processes.add_up(state.sums[name])
    if capture.shards is not None:
        for matrix in dict.fromkeys(matrix for _, matrices, _ in told for matrix in matrices):
            one = capture.accumulators[matrix.key]
            whole = [capture.shards.whole(share, matrix.shape) for share in one.mean_sums]
            one.mean_sums = [total for total in whole if total is not None]
    rest = PassState(state.inputs, state.matrices, {}, state.rows, ledger)
    for data in processes.bytes_to_first(b"" if processes.first else state_to_bytes(rest))[1:]:
        other = state_from_bytes(data)
        assert other is not None
        add_to(capture, other)
        ledger.add(other.ledger)
