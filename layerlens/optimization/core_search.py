"""Better allocations on the core: beam searches of growing width, in other orders, and on large neighbourhoods.

Each search looks only among options that a better allocation may have, so every improvement makes the next one faster,
and where the width suffices for all states, the allocation is proved optimal.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from layerlens.kernels._knapsack import Instance
from layerlens.optimization.beam import beam_search
from layerlens.optimization.lagrangian import Candidates, Dual, candidates_within, guided_search, solve_dual
from layerlens.optimization.reduced import Reduced

# A search takes all alternatives to the favourites if there are at most so many, else fewer, those of the least regret:
# more made searches slower and hardly ever better, since what pays for itself lies near the favourites.
ALL_ALTERNATIVES, SOME_ALTERNATIVES = 600, 200
# Widths of the first searches, and of the last ones, which may prove optimality. The widest pay only where the core is
# small enough for them to have a chance.
FIRST_WIDTHS, MIDDLE_WIDTH, LAST_WIDTH = (30, 300), 1_000, 20_000
PROOF_WIDTHS, PROOF_ALTERNATIVES = (100_000, 400_000), ALL_ALTERNATIVES
# The neighbourhoods end after so many; after some failures one must change some choices and may lose some of the gap.
WANDER_STEPS, WANDER_PATIENCE, KICKED, WANDER_LOSS = 2_000, 20, 4, 0.3
# The neighbourhoods end at this much work, counted in multiplications (1 to 3 ns each), and without proofs the last
# search is only as wide as it allows: a clock would make the answer depend on the machine. To lay out a neighbourhood
# takes as long as so many multiplications for each candidate of the core.
WORK_LIMIT, LAYOUT_WORK = 900_000_000, 128
# Where repair found nothing that fits.
FITTING_SHARES, FITTING_WIDTHS = (0.98, 0.95, 0.9, 0.8), (30, 300, 3_000)
# Between them one search in another order and neighbourhoods of so many alternatives.
ORDER_WIDTH, NEIGHBOURHOOD_ALTERNATIVES, NEIGHBOURHOOD_WIDTH = 300, 250, 100


@dataclass
class Incumbent:
    """The best allocation and the best bound so far, in the instance's units.

    Args:
        choice: int64 [g].
        value: its value.
        bound: no allocation has a larger value.
    """

    choice: np.ndarray
    value: float
    bound: float

    def offer(self, instance: Instance, choice: np.ndarray | None) -> bool:
        """Take ``choice``, which must fit, if it is better."""
        if choice is None:
            return False
        value = math.fsum(instance.value[choice])
        if value <= self.value:
            return False
        self.choice, self.value = choice, value
        self.bound = max(self.bound, value)
        return True

    def tighten(self, bound: float) -> None:
        """Take ``bound`` if it is tighter; it can never be below the value."""
        self.bound = max(self.value, min(self.bound, bound))


def search_core(
    reduced: Reduced,
    dual: Dual,
    incumbent: Incumbent,
    tolerance: float,
    seed: int,
    prove: bool,
    threads: int,
    progress: Callable[[Incumbent], None] = lambda incumbent: None,
    *,
    quick: bool = False,
) -> None:
    """Improve ``incumbent`` and tighten its bound until its gap is within ``tolerance`` or the searches are done.

    ``quick`` leaves it at the first searches, some ten milliseconds. ``prove`` adds searches of great width, a second
    or two, which close the gap of small cores. The wide search and the neighbourhoods run side by side with two
    threads, one after the other with one; the answer is the same.
    """
    search = CoreSearch(reduced, dual, incumbent, tolerance)
    for width, order in (*((width, 0) for width in FIRST_WIDTHS), (ORDER_WIDTH, 1), (MIDDLE_WIDTH, 0)):
        if search.closed():
            return
        search.whole(width, seed=order)
        progress(incumbent)
    if quick:
        return
    if not search.closed():
        _search_side_by_side(search, seed, prove, threads)
        progress(incumbent)
    for width in PROOF_WIDTHS if prove else ():
        if search.closed() or search.alternatives() > PROOF_ALTERNATIVES:
            return
        search.whole(width)
        progress(incumbent)


def _search_side_by_side(search: CoreSearch, seed: int, prove: bool, threads: int) -> None:
    """A wide search and the neighbourhoods, from the same start; what they find is joined.

    Where the wide search leaves no gap, it alone decides, so that the neighbourhoods may be stopped at any moment.
    """
    wide, near = search.copy(), search.copy()
    done = threading.Event()

    def search_widely() -> None:
        width = LAST_WIDTH if prove else min(LAST_WIDTH, wide.affordable_width(WORK_LIMIT))
        if width > ORDER_WIDTH:
            wide.whole(width)
        if wide.closed():
            done.set()

    def search_nearby() -> None:
        near.wander(np.random.RandomState(seed), WORK_LIMIT, done)  # its stream is frozen, unlike that of Generator

    if threads > 1:
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(search_widely), pool.submit(search_nearby)]
            try:
                for running in both:
                    running.result()
            finally:
                done.set()  # an interrupted wait must not last until the neighbourhoods are through
    else:
        search_widely()
        search_nearby()
    search.join(wide)
    if not wide.closed():
        search.join(near)


def find_fitting(reduced: Reduced, dual: Dual, threads: int) -> np.ndarray | None:
    """Some allocation that fits, int64 [g], where repair of the favourites found none; None where this finds none.

    Prices for smaller capacities make favourites that use less, from which repair has less to do; then beam searches
    over all options.
    """
    instance = reduced.instance
    for share in FITTING_SHARES:
        smaller = Instance(instance.offset, instance.value, instance.cost_rows, share * instance.capacity)
        choice = guided_search(instance, solve_dual(dataclasses.replace(reduced, instance=smaller), threads))
        if choice is not None:
            return choice
    everything = candidates_within(instance, dual, math.inf)
    worthless = -2.0 * instance.n_groups * (reduced.largest_value + 1.0)
    for width in FITTING_WIDTHS:
        outcome = beam_search(instance, dual, everything, worthless, width=width)
        if outcome.choice is not None or outcome.exhaustive:
            return outcome.choice
    return None


class Stop(Protocol):
    """Says when a search must end; a ``threading.Event`` does."""

    def is_set(self) -> bool: ...


class CoreSearch:
    """The searches of one core, and what they have found and proved so far."""

    def __init__(self, reduced: Reduced, dual: Dual, incumbent: Incumbent, tolerance: float) -> None:
        self.reduced, self.dual, self.incumbent, self.tolerance = reduced, dual, incumbent, tolerance
        self.instance = reduced.instance
        self.work, self.work_per_width = 0, 0.0
        self.neighbourhood, self.width = NEIGHBOURHOOD_ALTERNATIVES, NEIGHBOURHOOD_WIDTH
        # Everything that may be better than the first incumbent; what may be better than later ones is part of it.
        self.candidates = candidates_within(self.instance, dual, self.limit(), also=incumbent.choice)

    def copy(self) -> CoreSearch:
        """One that continues from here by itself."""
        other = copy.copy(self)
        other.incumbent = dataclasses.replace(self.incumbent)
        return other

    def join(self, other: CoreSearch) -> None:
        """Take what ``other``, a copy, has found beyond this one."""
        self.incumbent.offer(self.instance, other.incumbent.choice)
        self.incumbent.tighten(other.incumbent.bound)
        self._narrow()

    def limit(self) -> float:
        """An option with more regret is in no allocation better than the incumbent."""
        return self.dual.bound - self.incumbent.value + self.reduced.rounding(self.dual.price)

    def closed(self) -> bool:
        return self.incumbent.bound - self.incumbent.value <= self.tolerance * abs(self.incumbent.bound)

    def affordable_width(self, limit: float) -> int:
        """How wide the next search may be for all work to stay within ``limit``, judged by the last one."""
        return int(max(0.0, limit - self.work) / max(self.work_per_width, 1.0))

    def threshold(self) -> float:
        """What a better allocation is worth at least: values are multiples of the value unit, if there is one."""
        return self.incumbent.value + self.reduced.value_unit * (1.0 - 1e-6)

    def whole(self, width: int, seed: int = 0) -> None:
        """Search everything that may be better, or the best of it; tightens the bound."""
        self._narrow()
        candidates, limit = self.candidates, self.limit()
        if self.alternatives() > ALL_ALTERNATIVES:
            # The favourites have regret 0; beyond the limit there is only what this search leaves out.
            lowest = np.partition(candidates.regret, self.instance.n_groups + SOME_ALTERNATIVES)
            limit = float(lowest[self.instance.n_groups + SOME_ALTERNATIVES])
            candidates = self._only(candidates, candidates.regret < limit)
        outcome = beam_search(self.instance, self.dual, candidates, self.threshold(), width=width, seed=seed)
        self.work += outcome.work
        self.work_per_width = outcome.work / width
        self.incumbent.offer(self.instance, outcome.choice)
        # Whatever has an option beyond the limit is worth at most the dual's bound less that regret.
        beyond = self.dual.bound - limit + self.reduced.rounding(self.dual.price)
        self.incumbent.tighten(self.reduced.round_down(max(outcome.bound, beyond)))

    def wander(self, random: np.random.RandomState, limit: float, done: Stop) -> None:
        """Neighbourhoods until all work reaches ``limit``, of the incumbent and, where it has no better one, of others.

        Returns early when ``done`` is set.

        A kick forbids a few of its choices and takes the best beside them; what follows from there replaces the
        incumbent or is forgotten (iterated local search: Lourenço, Martin & Stützle 2003).
        """
        current, value, failures = self.incumbent.choice, self.incumbent.value, 0
        for _ in range(WANDER_STEPS):
            if done.is_set() or self.closed() or self.work >= limit:
                return
            if self.alternatives() <= self.neighbourhood:
                return
            kick = failures >= WANDER_PATIENCE
            if kick:
                current, value, failures = self.incumbent.choice, self.incumbent.value, 0
                least = self.incumbent.value - WANDER_LOSS * (self.dual.bound - self.incumbent.value)
            else:
                least = value + self.reduced.value_unit * (1.0 - 1e-6)
            found = self._search_near(random, current, least, KICKED if kick else 0)
            if found is None:
                failures += 1
                continue
            current, value, failures = found, math.fsum(self.instance.value[found]), 0
            if self.incumbent.offer(self.instance, found):
                self._narrow()

    def _search_near(
        self, random: np.random.RandomState, choice: np.ndarray, threshold: float, forbidden: int
    ) -> np.ndarray | None:
        """Keep ``choice`` but in some groups, drawn at random; in ``forbidden`` of these it must change."""
        candidates = self.candidates
        sizes = np.bincount(candidates.group, minlength=self.instance.n_groups) - 1
        several = random.permutation(np.flatnonzero(sizes))
        drawn = several[: 1 + int(np.searchsorted(np.cumsum(sizes[several]), self.neighbourhood))]
        free = np.zeros(self.instance.n_groups, dtype=bool)
        free[drawn] = True
        chosen = choice[candidates.group] == candidates.option
        keep = np.where(free[candidates.group], True, chosen)
        if forbidden:  # the beam search needs the favourites
            changing = np.zeros(self.instance.n_groups, dtype=bool)
            changing[drawn[choice[drawn] != self.dual.favourites[drawn]][:forbidden]] = True
            keep &= ~(chosen & changing[candidates.group])
        part = Candidates(candidates.option[keep], candidates.regret[keep], candidates.group[keep])
        outcome = beam_search(self.instance, self.dual, part, threshold, width=self.width)
        self.work += outcome.work + LAYOUT_WORK * len(candidates.option)
        return outcome.choice

    def alternatives(self) -> int:
        """How many options beside one of each group a better allocation may have."""
        return len(self.candidates.option) - self.instance.n_groups

    def _narrow(self) -> None:
        self.candidates = self._only(self.candidates, self.candidates.regret <= self.limit())

    def _only(self, candidates: Candidates, keep: np.ndarray) -> Candidates:
        """Those to keep, the incumbent's options, and the favourites."""
        keep = keep | (self.incumbent.choice[candidates.group] == candidates.option)
        keep |= self.dual.favourites[candidates.group] == candidates.option
        return Candidates(candidates.option[keep], candidates.regret[keep], candidates.group[keep])
