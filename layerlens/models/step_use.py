"""Peak memory and time of a training step as functions of the choice: what a recorded step says, with no bound in it.

The peak is the largest sum of what is alive at one time. The forward pass has what the frozen model has alive, and
what is kept so far for this choice. The backward pass has what is kept and not yet let go, the gradients that it
carries down, and the gradients of the parameters above. Options have something alive for a moment, too.

A checkpointed block keeps what goes into it, and nothing inside. The backward pass runs it again when it comes to it,
and has all that is kept inside alive from then until it has left the block.

Letters: o options, c causes, l layers, s storages, g calls of checkpointed blocks, f operations of the forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

RANDOM_STATE_BYTES = 5056
"""torch's state of random numbers: every checkpoint keeps it to draw the same dropout again, and the present one is
kept while it does."""


@dataclass(frozen=True)
class Checkpoints:
    """Calls of blocks that are checkpointed.

    Args:
        layers__gl: bool [g, l + 1], the layers for whose sake the backward pass enters the block, as in ``cause__cl``.
        span__gt: int64 [g, 3], see ``StepRecord.block_span__gt``.
        call__s: int64 [s], the call inside which a storage comes and goes; -1: none.
        call__o: int64 [o], the call inside which an option works; -1: none.
        given__ns: int64 [n, 2], (call, storage) of what goes into the blocks.
        around: float64 [f], see ``StepRecord.around__bf``.
        again_ms__g: float64 [g], milliseconds of the frozen block's part that is computed again.
        again_ms__o: float64 [o], the same of an option, and of what is computed again for its sake alone.
        late__o: bool [o], the option works after the part of its block that is computed again anyway.
    """

    layers__gl: np.ndarray
    span__gt: np.ndarray
    call__s: np.ndarray
    call__o: np.ndarray
    given__ns: np.ndarray
    around: np.ndarray
    again_ms__g: np.ndarray
    again_ms__o: np.ndarray
    late__o: np.ndarray


FORWARD, BACKWARD, OWN, AGAIN = "forward", "backward", "own", "again"
"""When the most is alive: in the forward pass, in the backward pass, in an option's own backward pass, and where a
checkpointed block is computed again."""


@dataclass(frozen=True)
class Timeline:
    """Bytes alive during the step of one choice, beside weights and the optimiser's state.

    Args:
        forwards, backwards, again: float64 [f], at each operation of the forward pass, of the backward pass, and of
            what is computed again; 0 where nothing is done.
        by_option__f: bool [f], of the backward pass: an option has more alive for a moment than the frozen layer.
        states: of random numbers, all the time.
    """

    forwards: np.ndarray
    backwards: np.ndarray
    again: np.ndarray
    by_option__f: np.ndarray
    states: float

    @property
    def peak(self) -> float:
        """The most bytes alive at one time."""
        return float(max(each.max(initial=0.0) for each in (self.forwards, self.backwards, self.again)) + self.states)

    @property
    def moment(self) -> tuple[str, int]:
        """When that is: FORWARD, BACKWARD, OWN or AGAIN, and the operation."""
        passes = {FORWARD: self.forwards, BACKWARD: self.backwards, AGAIN: self.again}
        kind = max(passes, key=lambda name: passes[name].max(initial=0.0))
        at = int(passes[kind].argmax())
        return (OWN if kind == BACKWARD and self.by_option__f[at] else kind), at


@dataclass(frozen=True)
class StepUse:
    """What a step needs and takes for any choice.

    Args:
        base_bytes: weights of the frozen model, and what the optimiser has of the parameters that always train.
        base_ms: forward pass and optimiser of every choice.
        cause__cl: bool [c, l + 1], see ``StepRecord``.
        cause_ms: float64 [c], of the backward pass.
        storage_bytes, storage_cause, storage_span__st: see ``StepRecord``.
        alive, held, passing: float64 [f], see ``StepRecord``.
        step_cause: int32 [f].
        layer__o: int64 [o], places on the axis l; -1 for "none" and for layers that were not recorded.
        span__ot: int64 [o, 2], first operation of its layer, and the one after its last.
        fixed__o: float64 [o], bytes of parameters and of their optimiser state.
        gradient__o: float64 [o], bytes of their gradients.
        kept__o: float64 [o], bytes that only this option keeps.
        passing__ox: float64 [o, 3], bytes alive for a moment: in its forward pass; in its backward pass; and from then
            until the frozen layer's own backward pass is done.
        ms__o: float64 [o], milliseconds of the option by itself.
        readers: storages that the option keeps whole, by option.
        changed: storages in whose place the option puts others, by option: what the frozen model keeps of one and what
            an option reads are then two.
        accumulates: a step begins with the gradients of the batch before it.
        checkpoints: of the blocks that are checkpointed; None where none is.
    """

    base_bytes: float
    base_ms: float
    cause__cl: np.ndarray
    cause_ms: np.ndarray
    storage_bytes: np.ndarray
    storage_cause: np.ndarray
    storage_span__st: np.ndarray
    alive: np.ndarray
    held: np.ndarray
    passing: np.ndarray
    step_cause: np.ndarray
    layer__o: np.ndarray
    span__ot: np.ndarray
    fixed__o: np.ndarray
    gradient__o: np.ndarray
    kept__o: np.ndarray
    passing__ox: np.ndarray
    ms__o: np.ndarray
    readers: dict[int, np.ndarray] = field(default_factory=dict)
    changed: dict[int, np.ndarray] = field(default_factory=dict)
    accumulates: bool = False
    checkpoints: Checkpoints | None = None

    def _adapted(self, entries: np.ndarray) -> np.ndarray:
        """bool [l + 1], the layers that the choice adapts."""
        layers = self.layer__o[entries]
        adapted = np.zeros(self.cause__cl.shape[1], dtype=bool)
        adapted[layers[layers >= 0]] = True
        adapted[-1] = True
        return adapted

    def paid(self, entries: np.ndarray) -> np.ndarray:
        """bool [c], the causes that the choice has."""
        return np.asarray((self.cause__cl & self._adapted(entries)).any(axis=1))

    def ms(self, entries: np.ndarray) -> float:
        """Milliseconds of the step with these options."""
        ms = self.base_ms + float(self.cause_ms[self.paid(entries)].sum() + self.ms__o[entries].sum())
        found = self.checkpoints
        if found is not None:
            entered = (found.layers__gl & self._adapted(entries)).any(axis=1)
            ms += float(found.again_ms__g[entered].sum() + found.again_ms__o[entries].sum())
        return ms

    def gb(self, entries: np.ndarray) -> float:
        """GB at the peak of the step with these options."""
        peak = self.timeline(entries).peak
        return 1e-9 * (self.base_bytes + float(self.fixed__o[entries].sum() + peak))

    def timeline(self, entries: np.ndarray) -> Timeline:
        """What is alive during the step with these options."""
        paid, count = self.paid(entries), len(self.alive)
        born, gone, released = self.storage_span__st.T
        frozen = (self.storage_cause >= 0) & paid[self.storage_cause]
        read, twice, its_own = np.zeros_like(frozen), np.zeros_like(frozen), np.zeros_like(frozen)
        n_readers = np.zeros(len(frozen), dtype=np.int64)
        until = np.where(frozen, released, count)  # the lowest operation at which it is still there
        for entry in entries.tolist():
            own = self.readers.get(entry)
            if own is not None:
                read[own] = True
                n_readers[own] += 1
                until[own] = np.minimum(until[own], np.maximum(self.span__ot[entry, 0], born[own]))
            if entry in self.changed:
                twice[self.changed[entry]] = True
                its_own[np.intersect1d(self.changed[entry], [] if own is None else own).astype(np.int64)] = True
        # An option that reads what it replaces, as an adapter does, keeps the first; whoever else reads it, the second.
        twice &= read & (frozen | (its_own & (n_readers > 1)))
        kept = frozen | read
        n_bytes = self.storage_bytes * (1.0 + twice)
        first, after = self.span__ot[entries].T
        end = np.maximum(after - 1, 0)
        own_kept, gradients = self.kept__o[entries], self.gradient__o[entries]
        # What lies inside a checkpointed block that the backward pass enters: by its call, -1 where it does not.
        inside__s, inside__o = np.full(len(kept), -1), np.full(len(entries), -1)
        found, entered = self.checkpoints, np.zeros(0, dtype=np.int64)
        if found is not None:
            enters = (found.layers__gl & self._adapted(entries)).any(axis=1)
            entered = np.flatnonzero(enters)
            enters = np.append(enters, False)
            inside__s = np.where(enters[found.call__s], found.call__s, -1)
            inside__o = np.where(enters[found.call__o[entries]], found.call__o[entries], -1)
            for call, storage in found.given__ns[enters[found.given__ns[:, 0]]].tolist():
                kept[storage] = True
                until[storage] = min(until[storage], found.span__gt[call, 0])
        stays, lives = kept & (inside__s < 0), inside__o < 0
        forwards = self.alive + _from(gone[stays], n_bytes[stays], count) + _from(first[lives], own_kept[lives], count)
        np.add.at(forwards, end, self.passing__ox[entries, 0])
        np.add.at(forwards, end[~lives], own_kept[~lives])
        after_own = _from(first, self.passing__ox[entries, 2], count) - _from(
            after, self.passing__ox[entries, 2], count
        )
        runs = (self.step_cause >= 0) & paid[self.step_cause]
        moment = np.zeros(count)
        np.add.at(moment, end, self.passing__ox[entries, 1])
        beside = (self.passing + after_own) * runs
        by_option, moment = moment > beside, np.maximum(moment, beside)
        backwards = self.held + _from(until[stays], n_bytes[stays], count) + _from(first[lives], own_kept[lives], count)
        if self.accumulates:
            forwards, backwards = forwards + gradients.sum(), backwards + gradients.sum()
        else:
            backwards = backwards + gradients.sum() - _from(after, gradients, count)
        again = np.zeros(count)
        if found is not None and len(entered):
            came_to = np.zeros(count)  # what is alive when the backward pass comes to the block
            for call in entered.tolist():
                start, stop, stop_again = found.span__gt[call]
                if (found.late__o[entries] & (inside__o == call)).any():
                    stop_again = stop
                came_to[start:stop_again] = backwards[stop - 1]
            hidden, its = kept & (inside__s >= 0), inside__o >= 0
            ends__s, ends__o = found.span__gt[inside__s[hidden], 1], found.span__gt[inside__o[its], 1]
            own_inside = _between(first[its], ends__o, own_kept[its], count)
            computed = self.alive - found.around + _between(gone[hidden], ends__s, n_bytes[hidden], count) + own_inside
            np.add.at(computed, end, self.passing__ox[entries, 0])
            again = np.where(came_to > 0.0, came_to + computed, 0.0)
            backwards = backwards + _between(until[hidden], ends__s, n_bytes[hidden], count) + own_inside
        backwards = backwards + moment
        runs[end] = True
        states = RANDOM_STATE_BYTES * (len(entered) + 1) * bool(len(entered))
        return Timeline(forwards, np.where(runs, backwards, 0.0), again, by_option, states)


def _from(places: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """float64 [count], at each place the sum of the values whose place it is, or comes after."""
    sums: np.ndarray = np.cumsum(np.bincount(np.minimum(places, count), weights=values, minlength=count + 1))[:count]
    return sums


def _between(places: np.ndarray, ends: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """float64 [count], at each place the sum of the values that begin there or before, and end after it."""
    return _from(places, values, count) - _from(np.maximum(places, ends), values, count)
