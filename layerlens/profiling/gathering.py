"""Several processes in one pass: sums that are spread over them, and how their shares become one at process 0.

Totals are added by one reduction each, once, at the end of the pass. Everything that belongs to single samples or
batches is sent as it is and put into the order of the batches, so it has the bits that one process would have given it.
"""

from __future__ import annotations

import torch

from layerlens.profiling.pass_sums import Ledger, PassSums, PassTensors
from layerlens.profiling.saved_pass import pass_from_bytes, pass_to_bytes
from layerlens.utils.processes import Processes


def gather(sums: PassSums, ledger: Ledger, processes: Processes, device: torch.device) -> None:
    """Add the other processes' totals, rows and batches to those of process 0; totals that nobody has are made there.

    Args:
        sums, ledger: of this process.
        processes: those that measured together.
        device: where the model has its inputs.
    """
    if processes.alone:
        return
    mine = sums.tensors()
    facts = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in mine.totals.items()}
    told = processes.everyone("sums", (mine.inputs, mine.matrices, facts))
    for inputs, matrices, _ in told:
        sums.add_empty(inputs, matrices)
    everywhere = {name: fact for _, _, each in told for name, fact in each.items()}
    for name, (shape, dtype) in everywhere.items():
        if name not in facts:
            sums.add_total(name, torch.zeros(shape, dtype=dtype, device=device))
    spread = {("matrix", *key, one.name) for key, matrix in sums.accumulators.items() for one in matrix.spread}
    mine = sums.tensors()
    for name in everywhere:
        if name not in spread:
            processes.add_up(mine.totals[name])
    if sums.shards is not None:
        for matrix in dict.fromkeys(matrix for _, matrices, _ in told for matrix in matrices):
            accumulator = sums.accumulators[matrix.key]
            for one in accumulator.spread:
                whole = sums.shards.whole(accumulator.totals.pop(one.name), matrix.shape)
                if whole is not None:
                    accumulator.totals[one.name] = whole
    rest = PassTensors(mine.inputs, mine.matrices, {}, mine.rows)
    for data in processes.bytes_to_first(b"" if processes.first else pass_to_bytes(rest, ledger))[1:]:
        other = pass_from_bytes(data)
        assert other is not None
        sums.add(other[0], device)
        ledger.add(other[1])
