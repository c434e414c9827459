"""A pass over the calibration data that can be taken up again: what some batches have added up to, as bytes.

An interrupted profile continues after the last batch that was saved. The same number of processes ends with the same
bits, since all sums go on in the same order; another number ends with the same sums to rounding. Saving takes at most
``time_share`` of the time, a twentieth unless told otherwise, so small models are saved after every batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Protocol

from layerlens.profiling.capture import Capture
from layerlens.profiling.ledger import Ledger
from layerlens.profiling.pass_state import (
    PassState,
    add_to,
    shards_of,
    state_from_bytes,
    state_of,
    state_to_bytes,
)
from layerlens.utils.processes import ALONE, Processes

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

    def restore(self, capture: Capture, ledger: Ledger, processes: Processes = ALONE) -> set[int]:
        """Put what was kept for this process into ``capture`` and ``ledger``; the batches that are done anywhere.

        A part goes to the process of its number, and beyond their count to that of its remainder, so that an equal
        number of processes goes on exactly as it began.
        """
        self._part = processes.rank
        parts = processes.from_first("unfinished parts", sorted(self.store.names()))
        mine: dict[int, PassState] = {}
        for part in (part for part in parts if part % processes.size == processes.rank):
            data = self.store.read(part)
            state = state_from_bytes(data) if data is not None else None
            if state is not None and state.shards == shards_of(capture):  # shares of another spreading do not fit
                mine[part] = state
        told = processes.everyone("finished batches", {part: set(one.ledger.records) for part, one in mine.items()})
        done: set[int] = set()
        # A part that took another one over, and was interrupted before that one was removed, has all its batches.
        found = {part: batches for each in told for part, batches in each.items()}
        for part in sorted(found, key=lambda part: (-len(found[part]), part)):
            if not found[part] & done:
                done |= found[part]
                if part in mine:
                    add_to(capture, mine[part])
                    ledger.add(mine[part].ledger)
        self._superseded = [part for part in mine if part != self._part]
        return done

    def after_batch(self, capture: Capture, ledger: Ledger) -> None:
        """Keep the state after these batches, unless that would take more than its share of the time."""
        start = time.perf_counter()
        if self.time_share < 1.0 and start - self._last_end < self._last_cost / self.time_share:
            return
        if any(not kept.on_host for one in capture.accumulators.values() for kept in one.kept.values()):
            return  # activations stay on their device
        state = state_of(capture, ledger)
        if state.nbytes > MAX_BYTES:
            return
        self.store.write(self._part, state_to_bytes(state))
        if self._superseded:
            self.store.remove(self._superseded)
            self._superseded = []
        self._last_end = time.perf_counter()
        self._last_cost = self._last_end - start
