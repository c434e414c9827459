"""A pass over the calibration data in parts: taken up again after an interruption, and made by several processes.

An interrupted profile continues after the last batch that was saved. The same number of processes ends with the same
bits, since all sums go on in the same order; another number ends with the same sums to rounding. Saving takes at most
``time_share`` of the time, a twentieth unless told otherwise, so small models are saved after every batch.

Processes' totals are added by one reduction each, once, at the end. Everything that belongs to single samples or
batches is sent as it is and put into the order of the batches, so it has the bits that one process would have given.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from layerlens.profiling.pass_sums import BatchRecord, Key, Ledger, Matrix, PassSums, PassTensors
from layerlens.utils.processes import ALONE, Processes

FORMAT = "layerlens-pass-5"
TEXT = "text"
SHARE_OF_TIME = 0.05
MAX_BYTES = 2**31
"""Larger states are not saved: they are copied in memory on the way to the disk."""


class PassStore(Protocol):
    """Where the parts of an unfinished pass are kept, one for each process that measures."""

    def names(self) -> list[int]:
        """The parts that are there."""
        ...

    def read(self, part: int) -> bytes | None:
        """What was written last; None when there is nothing or it is damaged."""
        ...

    def write(self, part: int, data: bytes) -> None:
        """Keep ``data`` in place of what was kept."""
        ...

    def remove(self, parts: Iterable[int]) -> None:
        """Forget these parts."""
        ...


class SavedPass:
    """Where a pass is kept between interruption and resumption.

    Args:
        store: holds the parts.
        time_share: largest share of the time that saving may take; 1 or more: save after every batch.
    """

    def __init__(self, store: PassStore, time_share: float = SHARE_OF_TIME) -> None:
        self.store = store
        self.time_share = time_share
        self._part = 0
        self._superseded: list[int] = []
        self._last_end = time.perf_counter()
        self._last_cost = 0.0

    def restore(self, sums: PassSums, ledger: Ledger, device: torch.device, processes: Processes = ALONE) -> set[int]:
        """Put what was kept for this process into ``sums`` and ``ledger``; the batches that are done anywhere.

        A part goes to the process of its number, and beyond their count to that of its remainder, so that an equal
        number of processes goes on exactly as it began.
        """
        self._part = processes.rank
        parts = processes.from_first("unfinished parts", sorted(self.store.names()))
        mine: dict[int, tuple[PassTensors, Ledger]] = {}
        for part in (part for part in parts if part % processes.size == processes.rank):
            data = self.store.read(part)
            kept = pass_from_bytes(data) if data is not None else None
            if kept is not None and kept[0].shards == sums.n_shards:  # shares of another spreading do not fit
                mine[part] = kept
        told = processes.everyone("finished batches", {part: set(kept[1].records) for part, kept in mine.items()})
        done: set[int] = set()
        # A part that took another one over, and was interrupted before that one was removed, has all its batches.
        found = {part: batches for each in told for part, batches in each.items()}
        for part in sorted(found, key=lambda part: (-len(found[part]), part)):
            if not found[part] & done:
                done |= found[part]
                if part in mine:
                    sums.add(mine[part][0], device)
                    ledger.add(mine[part][1])
        self._superseded = [part for part in mine if part != self._part]
        return done

    def after_batch(self, sums: PassSums, ledger: Ledger) -> None:
        """Keep the state after these batches, unless that would take more than its share of the time."""
        start = time.perf_counter()
        if self.time_share < 1.0 and start - self._last_end < self._last_cost / self.time_share:
            return
        tensors = sums.tensors()
        if any(name[0] == "matrix" and rows.device.type != "cpu" for name, rows in tensors.rows.items()):
            return  # activations stay on their device
        if tensors.nbytes > MAX_BYTES:
            return
        self.store.write(self._part, pass_to_bytes(tensors, ledger))
        if self._superseded:
            self.store.remove(self._superseded)
            self._superseded = []
        self._last_end = time.perf_counter()
        self._last_cost = self._last_end - start


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
    rest = PassTensors(mine.inputs, mine.matrices, {}, mine.rows, unmeasured=mine.unmeasured)
    for data in processes.bytes_to_first(b"" if processes.first else pass_to_bytes(rest, ledger))[1:]:
        other = pass_from_bytes(data)
        assert other is not None
        sums.add(other[0], device)
        ledger.add(other[1])


def pass_to_bytes(state: PassTensors, ledger: Ledger) -> bytes:
    """What some batches add up to, as one safetensors file."""
    tensors = {"\t".join(("total", *name)): tensor.contiguous().cpu() for name, tensor in state.totals.items()}
    tensors |= {"\t".join(("row", *name)): tensor.contiguous().cpu() for name, tensor in state.rows.items()}
    for number, record in ledger.records.items():
        tensors |= {f"index\t{number}": record.index, f"loss\t{number}": record.losses}
        tensors[f"batch\t{number}"] = torch.from_numpy(record.sums)
        if record.labels is not None:
            tensors[f"label\t{number}"] = record.labels.contiguous()
    text = {
        "format": FORMAT,
        "shards": state.shards,
        "inputs": state.inputs,
        "matrices": [[one.key, one.shape, one.source, one.looked_up] for one in state.matrices],
        "names": list(ledger.names),
        "unmeasured": state.unmeasured,
        "tokens": {number: record.n_tokens for number, record in ledger.records.items()},
    }
    tensors[TEXT] = torch.frombuffer(bytearray(json.dumps(text).encode()), dtype=torch.uint8)
    return save(tensors)


def pass_from_bytes(data: bytes) -> tuple[PassTensors, Ledger] | None:
    """What ``pass_to_bytes`` made; None for what another version made, or no one did."""
    try:
        tensors = load(data)
        text = json.loads(bytes(tensors.pop(TEXT).numpy()))
        if text["format"] != FORMAT:
            return None
        return _tensors_of(tensors, text), _ledger_of(tensors, text)
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError):
        return None


def _tensors_of(tensors: dict[str, torch.Tensor], text: dict[str, Any]) -> PassTensors:
    named = {tuple(name.split("\t")): tensor for name, tensor in tensors.items()}
    return PassTensors(
        inputs=[_key(key) for key in text["inputs"]],
        matrices=[
            Matrix(_key(key), (s[0], s[1], s[2]), _key(source), *looked_up)
            for key, s, source, *looked_up in text["matrices"]
        ],
        totals={name[1:]: tensor for name, tensor in named.items() if name[0] == "total"},
        rows={name[1:]: tensor for name, tensor in named.items() if name[0] == "row"},
        shards=text["shards"],
        unmeasured=text["unmeasured"],
    )


def _ledger_of(tensors: dict[str, torch.Tensor], text: dict[str, Any]) -> Ledger:
    ledger = Ledger()
    ledger.names = {name: place for place, name in enumerate(text["names"])}
    for number, n_tokens in text["tokens"].items():
        index, losses = tensors[f"index\t{number}"], tensors[f"loss\t{number}"]
        values = np.array(tensors[f"batch\t{number}"].numpy())
        ledger.records[int(number)] = BatchRecord(index, losses, tensors.get(f"label\t{number}"), n_tokens, values)
    return ledger


def _key(parts: list[str]) -> Key:
    return parts[0], parts[1]
