"""Peak memory and time of a training step as functions of the choice: what a recorded step says, with no bound in it.

The peak is the largest sum of what is alive at one time. The forward pass has what the frozen model has alive, and
what is kept so far for this choice. The backward pass has what is kept and not yet let go, the gradients that it
carries down, and the gradients of the parameters above. Options have something alive for a moment, too.

Letters: o options, c causes, l layers, s storages, f operations of the forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


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

    def paid(self, entries: np.ndarray) -> np.ndarray:
        """bool [c], the causes that the choice has."""
        layers = self.layer__o[entries]
        adapted = np.zeros(self.cause__cl.shape[1], dtype=bool)
        adapted[layers[layers >= 0]] = True
        adapted[-1] = True
        return np.asarray((self.cause__cl & adapted).any(axis=1))

    def ms(self, entries: np.ndarray) -> float:
        """Milliseconds of the step with these options."""
        return self.base_ms + float(self.cause_ms[self.paid(entries)].sum() + self.ms__o[entries].sum())

    def gb(self, entries: np.ndarray) -> float:
        """GB at the peak of the step with these options."""
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
        n_bytes = (self.storage_bytes * (1.0 + twice))[kept]
        first, after = self.span__ot[entries].T
        own_bytes = _from(first, self.kept__o[entries], count)
        gradients = self.gradient__o[entries]
        forwards = self.alive + _from(gone[kept], n_bytes, count) + own_bytes
        np.add.at(forwards, np.maximum(after - 1, 0), self.passing__ox[entries, 0])
        stays = _from(first, self.passing__ox[entries, 2], count) - _from(after, self.passing__ox[entries, 2], count)
        runs = (self.step_cause >= 0) & paid[self.step_cause]
        moment = np.zeros(count)
        np.add.at(moment, np.maximum(after - 1, 0), self.passing__ox[entries, 1])
        moment = np.maximum(moment, (self.passing + stays) * runs)
        backwards = self.held + moment + _from(until[kept], n_bytes, count) + own_bytes
        if self.accumulates:
            forwards, backwards = forwards + gradients.sum(), backwards + gradients.sum()
        else:
            backwards = backwards + gradients.sum() - _from(after, gradients, count)
        runs[np.maximum(after - 1, 0)] = True
        peak = max(forwards.max(initial=0.0), backwards[runs].max(initial=0.0))
        return 1e-9 * (self.base_bytes + float(self.fixed__o[entries].sum() + peak))


def _from(places: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """float64 [count], at each place the sum of the values whose place it is, or comes after."""
    sums: np.ndarray = np.cumsum(np.bincount(np.minimum(places, count), weights=values, minlength=count + 1))[:count]
    return sums
