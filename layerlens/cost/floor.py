"""Lower bounds of a training step's memory and time that add up: no choice needs less than its sum.

The peak of a step is the most that is alive at any of its moments, so what is alive at one moment is never above it. At
one moment nearly everything is a sum: what an option has, and what is paid once by what causes it. Left out is only
what takes two to be there (a gradient that is there when the backward pass comes to an operation below it, which
another option makes it do), and causes that cross are narrowed.

So a budget of memory is one row for each of a few moments, and what is proved within these rows holds for every choice
whose peak is within the budget.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from layerlens.cost.causes import ALWAYS, Paid
from layerlens.models import RESOURCES, CostTable
from layerlens.models.step_use import AGAIN, BACKWARD, FORWARD, OWN, RANDOM_STATE_BYTES, StepUse

Moment = tuple[str, int]
"""FORWARD, BACKWARD, OWN or AGAIN, and the operation."""
VRAM, STEP = RESOURCES.index("vram_gb"), RESOURCES.index("step_ms")


def first_moments(use: StepUse) -> list[Moment]:
    """When every choice has much alive: the most of a frozen forward pass, its end, and the first backward pass."""
    runs = np.flatnonzero(use.step_cause >= 0)
    found = {(FORWARD, int(use.alive.argmax())), (FORWARD, len(use.alive) - 1)}
    return sorted(found | {(BACKWARD, int(at)) for at in runs[-1:]})


def floor_table(
    table: CostTable,
    names: Sequence[str],
    moments: Sequence[Moment],
    lowest: Collection[str] | None = None,
    below: Collection[str] = (),
    chosen: Collection[str] = (),
) -> CostTable:
    """Costs of the same options that add up to at most what any choice needs.

    Args:
        table: with a recorded step.
        names: of the layers of the model.
        moments: of memory.
        lowest, below: where they are given, the costs are of choices that adapt one of the layers ``lowest`` and none
            of those ``below``. So most causes are known, and the sums are nearer to what choices need.
        chosen: further layers that these choices adapt.

    Returns:
        a table whose rows after those of ``RESOURCES`` are memory at each moment, in GB; ``moments`` has what every
        choice has alive there. Its own row of memory is what is kept at the end of the forward pass, which a score may
        weigh: never more than what the other table adds up.
    """
    use = table.step
    assert use is not None
    n_rows = len(RESOURCES) + len(moments)
    paid = Paid(table.options, names, use.layer__o, use.cause__cl.shape[1] - 1, n_rows, lowest, below, chosen)
    alive = _Alive(use, paid)
    paid.own[: len(RESOURCES)] = table.cost__ro
    paid.own[STEP] = use.ms__o
    for cause, ms in zip(alive.of_cause, use.cause_ms.tolist(), strict=True):
        paid.add(cause, _at(STEP, ms, n_rows))
    if use.checkpoints is not None:
        paid.own[STEP] += use.checkpoints.again_ms__o
        for cause, ms in zip(alive.of_call, use.checkpoints.again_ms__g.tolist(), strict=True):
            paid.add(cause, _at(STEP, ms, n_rows))
    for row, (kind, at), passing in (
        (VRAM, (FORWARD, len(use.alive) - 1), False),
        *((len(RESOURCES) + number, moment, True) for number, moment in enumerate(moments)),
    ):
        own, shared = alive.when(kind, at, passing)
        paid.own[row] = 1e-9 * own
        for cause, n_bytes in shared:
            paid.add(cause if n_bytes > 0.0 else ALWAYS, _at(row, 1e-9 * n_bytes, n_rows))
    base_ms = float(use.base_ms + paid.base[STEP])
    charges, depth = paid.charges(narrow=True)
    return replace(
        table,
        cost__ro=paid.own,
        base=table.base | {"vram_gb": 0.0, "step_ms": base_ms},
        charges=charges,
        depth=depth,
        least={},
        moments=tuple((1e-9 * use.base_bytes + paid.base[len(RESOURCES) :]).tolist()),
    )


def _at(row: int, amount: float, n_rows: int) -> np.ndarray:
    cost = np.zeros(n_rows)
    cost[row] = amount
    return cost


class _Alive:
    """What is surely alive at a moment, by what causes it.

    Each part is that of ``StepUse.timeline``, as far as it is a sum.
    """

    def __init__(self, use: StepUse, paid: Paid) -> None:
        self.use, self.settled, self.certain = use, paid.settled, paid.certain
        self.of_cause = [paid.of(layers) for layers in use.cause__cl]
        found = use.checkpoints
        n_storages, n_options = len(use.storage_bytes), len(use.layer__o)
        self.of_call = [] if found is None else [paid.of(layers) for layers in found.layers__gl]
        self.call__s = np.full(n_storages, -1) if found is None else found.call__s
        self.call__o = np.full(n_options, -1) if found is None else found.call__o
        self.given: dict[int, list[int]] = defaultdict(list)
        for call, storage in [] if found is None else found.given__ns.tolist():
            self.given[storage].append(call)
        readers: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        for entry, storages in use.readers.items():
            for storage in storages.tolist():
                readers[storage][int(use.span__ot[entry, 0])] |= 1 << entry
        self.readers = {storage: list(by_first.items()) for storage, by_first in readers.items()}
        self.first__o, after = use.span__ot.T
        self.after__o, self.end__o = after, np.maximum(after - 1, 0)
        self.adapts__o = np.zeros(n_options, dtype=bool)
        self.adapts__o[[entry for _, entry in paid.entries]] = True

    def when(self, kind: str, at: int, passing: bool = True) -> tuple[np.ndarray, Iterable[tuple[int, float]]]:
        """Bytes of each option by itself, and (cause, bytes) of what is paid once.

        Args:
            kind, at: the moment.
            passing: with what is there in every choice, and with what an option has alive for a moment.
        """
        own, shared = self._parts(kind, at)
        if not passing:
            return own[0] + own[1], (each for each in shared if each[0] != ALWAYS)
        return own.sum(axis=0), shared

    def _parts(self, kind: str, at: int) -> tuple[np.ndarray, list[tuple[int, float]]]:
        """(bytes of options: parameters, kept and gradients, for a moment; what is paid once)."""
        use = self.use
        own = np.zeros((3, len(self.first__o)))
        own[0] = use.fixed__o
        shared = [(cause, float(RANDOM_STATE_BYTES)) for cause in self.of_call]
        ends_here = self.adapts__o & (self.end__o == at)
        if kind == FORWARD:
            shared.append((ALWAYS, float(use.alive[at])))
            shared += self._stored(self._whole, (use.storage_span__st[:, 1] <= at) & (self.call__s < 0))
            shared += [(bits, n_bytes) for bits, n_bytes, gone, _ in self._twice if gone <= at]
            own[1] = use.kept__o * np.where(self.call__o < 0, self.first__o <= at, ends_here)
            own[1] += use.gradient__o * use.accumulates
            own[2] = use.passing__ox[:, 0] * ends_here
            return own, shared
        if kind == AGAIN:
            return self._again(at, own, shared, ends_here)
        cause = use.step_cause[at]
        passes = self.of_cause[cause] if cause >= 0 else 0
        when = self.settled(passes | _bits(ends_here))
        has = self._in(when)
        own[1] = has * self._held(at)
        shared += self._carried(at, when)
        hidden = self.call__s >= 0
        if hidden.any():
            assert use.checkpoints is not None
            stop__g = use.checkpoints.span__gt[:, 1]
            left = hidden & (stop__g[self.call__s] > at)
            shared += self._stored((cause & when for cause in self._until(at)), left)
            inside = (self.call__o >= 0) & (self.first__o <= at) & (stop__g[self.call__o] > at)
            own[1] += has * inside * use.kept__o
        if kind == OWN:
            own[2] = use.passing__ox[:, 1] * ends_here
        else:
            shared.append((passes, float(use.passing[at])))
            over = (self.first__o <= at) & (at < self.after__o)
            own[2] = use.passing__ox[:, 2] * over * self._in(passes)
        return own, shared

    def _again(
        self, at: int, own: np.ndarray, shared: list[tuple[int, float]], ends_here: np.ndarray
    ) -> tuple[np.ndarray, list[tuple[int, float]]]:
        """What is alive where the block's operation ``at`` is computed again."""
        use, found = self.use, self.use.checkpoints
        assert found is not None
        call = int(np.flatnonzero((found.span__gt[:, 0] <= at) & (at < found.span__gt[:, 1]))[0])
        _, stop, stop_again = found.span__gt[call].tolist()
        mine = self.call__o == call
        when = self.of_call[call] if at < stop_again else self.settled(_bits(self.adapts__o & mine & found.late__o))
        has = self._in(when)
        own[1] = has * (self._held(stop - 1) + use.kept__o * (mine & (self.first__o <= at)))
        own[2] = has * use.passing__ox[:, 0] * ends_here
        shared += self._carried(stop - 1, when)
        shared.append((when, float(use.alive[at] - found.around[at])))
        gone = (self.call__s == call) & (use.storage_span__st[:, 1] <= at)
        shared += self._stored((cause & when for cause in self._whole), gone)
        return own, shared

    def _held(self, at: int) -> np.ndarray:
        """What options have beside their parameters when the backward pass comes to an operation."""
        use = self.use
        kept = use.kept__o * ((self.call__o < 0) & (self.first__o <= at))
        return np.asarray(kept + use.gradient__o * (use.accumulates | (self.after__o > at)))

    def _carried(self, at: int, when: int) -> Iterator[tuple[int, float]]:
        """Gradients on their way down and what is still kept, where the backward pass comes here for ``when``."""
        yield when, float(self.use.held[at])
        yield from self._stored((cause & when for cause in self._until(at)), self.call__s < 0)
        yield from ((bits & when, n_bytes) for bits, n_bytes, _, until in self._twice if until <= at and bits & when)

    @cached_property
    def _twice(self) -> list[tuple[int, float, int, int]]:
        """What options that read and replace it, as adapters do, keep twice, where something else keeps it for sure.

        (These options, bytes, the operation after which it would be gone, and the one to which the second is kept.)
        """
        use, found = self.use, dict[int, tuple[int, int]]()
        for entry, changed in use.changed.items():
            for storage in np.intersect1d(changed, use.readers.get(entry, np.zeros(0, dtype=np.int64))).tolist():
                bits, first = found.get(storage, (0, 0))
                found[storage] = bits | 1 << entry, max(first, int(self.first__o[entry]))
        twice = []
        for storage, (bits, first) in found.items():
            if self.call__s[storage] >= 0:
                continue
            born, gone, released = use.storage_span__st[storage].tolist()
            cause, until = int(use.storage_cause[storage]), max(first, born)
            if cause >= 0 and self.of_cause[cause] == ALWAYS:
                until = min(released, until)
            else:
                read = 0
                for _, readers in self.readers.get(storage, ()):
                    read |= readers
                if not any(read & options == options and not options & bits for options in self.certain):
                    continue
            twice.append((self.settled(bits), float(use.storage_bytes[storage]), gone, until))
        return twice

    @cached_property
    def _whole(self) -> list[int]:
        """What makes each storage be kept."""
        found = []
        for storage, cause in enumerate(self.use.storage_cause.tolist()):
            whole = self.of_cause[cause] if cause >= 0 else 0
            for _, bits in self.readers.get(storage, ()):
                whole |= bits
            for call in self.given.get(storage, ()):
                whole |= self.of_call[call]
            found.append(self.settled(whole))
        return found

    def _until(self, at: int) -> Iterator[int]:
        """What makes each storage be kept until the backward pass has come to an operation or below it."""
        found = self.use.checkpoints
        for storage, cause in enumerate(self.use.storage_cause.tolist()):
            born, _, released = self.use.storage_span__st[storage].tolist()
            still = self.of_cause[cause] if cause >= 0 and released <= at else 0
            for first, bits in self.readers.get(storage, ()) if born <= at else ():
                if first <= at:
                    still |= bits
            for call in self.given.get(storage, ()):
                assert found is not None
                if found.span__gt[call, 0] <= at:
                    still |= self.of_call[call]
            yield self.settled(still)

    def _stored(self, causes: Iterable[int], there__s: np.ndarray) -> Iterator[tuple[int, float]]:
        for cause, there, n_bytes in zip(causes, there__s.tolist(), self.use.storage_bytes.tolist(), strict=True):
            if there and cause:
                yield cause, n_bytes

    def _in(self, when: int) -> np.ndarray:
        """bool [o], whether the option is among these."""
        if when == ALWAYS:
            return self.adapts__o
        n_bytes = (len(self.adapts__o) + 7) // 8
        bits = np.unpackbits(np.frombuffer(when.to_bytes(n_bytes, "little"), dtype=np.uint8), bitorder="little")
        return np.asarray(bits[: len(self.adapts__o)].astype(bool))


def _bits(options: np.ndarray) -> int:
    return int.from_bytes(np.packbits(options, bitorder="little").tobytes(), "little")
