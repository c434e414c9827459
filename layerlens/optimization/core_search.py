"""Better allocations on the core: beam searches of growing width, in other orders, and on large neighbourhoods.

Each search looks only among options that a better allocation may have, so every improvement makes the next one faster,
and where the width suffices for all states, the allocation is proved optimal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from layerlens.kernels._lagrangian import Instance
from layerlens.optimization.beam import beam_search
from layerlens.optimization.lagrangian import Candidates, Dual, candidates_within
from layerlens.optimization.reduced import Reduced

# A search takes all alternatives to the favourites if there are at most so many, else fewer, those of the least regret:
# more made searches slower and hardly ever better, since what pays for itself lies near the favourites.
ALL_ALTERNATIVES, SOME_ALTERNATIVES = 600, 200
# Widths of the first searches, and of the last ones, which may prove optimality. The widest pay only where the core is
# small enough for them to have a chance.
FIRST_WIDTHS, LAST_WIDTHS = (30, 300), (3_000, 20_000)
PROOF_WIDTHS, PROOF_ALTERNATIVES = (100_000, 400_000), ALL_ALTERNATIVES
# Between them: rounds of one search in another order and two of a neighbourhood with so many alternatives.
ROUNDS, ORDER_WIDTH, NEIGHBOURHOODS, NEIGHBOURHOOD_ALTERNATIVES, NEIGHBOURHOOD_WIDTH = 6, 300, 2, 250, 100


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
    progress: Callable[[Incumbent], None] = lambda incumbent: None,
) -> None:
    """Improve ``incumbent`` and tighten its bound until its gap is within ``tolerance`` or the searches are done.

    ``prove`` adds searches of great width, a second or two, which close the gap of small cores.
    """
    search = _CoreSearch(reduced, dual, incumbent, tolerance)
    for width in FIRST_WIDTHS:
        if search.closed():
            return
        search.whole(width)
        progress(incumbent)
    random = np.random.RandomState(seed)  # its stream is frozen, unlike that of Generator
    for round_ in range(ROUNDS):
        if search.closed():
            return
        search.whole(ORDER_WIDTH, seed=round_ + 1)
        for _ in range(NEIGHBOURHOODS):
            if not search.closed():
                search.neighbourhood(random)
        progress(incumbent)
    for width in LAST_WIDTHS + (PROOF_WIDTHS if prove else ()):
        if search.closed() or (width in PROOF_WIDTHS and search.alternatives() > PROOF_ALTERNATIVES):
            return
        search.whole(width)
        progress(incumbent)


class _CoreSearch:
    def __init__(self, reduced: Reduced, dual: Dual, incumbent: Incumbent, tolerance: float) -> None:
        self.reduced, self.dual, self.incumbent, self.tolerance = reduced, dual, incumbent, tolerance
        self.instance = reduced.instance
        # Everything that may be better than the first incumbent; what may be better than later ones is part of it.
        self.candidates = candidates_within(self.instance, dual, self.limit(), also=incumbent.choice)

    def limit(self) -> float:
        """An option with more regret is in no allocation better than the incumbent."""
        return self.dual.bound - self.incumbent.value + self.reduced.rounding(self.dual.price)

    def closed(self) -> bool:
        return self.incumbent.bound - self.incumbent.value <= self.tolerance * abs(self.incumbent.bound)

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
        self.incumbent.offer(self.instance, outcome.choice)
        # Whatever has an option beyond the limit is worth at most the dual's bound less that regret.
        beyond = self.dual.bound - limit + self.reduced.rounding(self.dual.price)
        self.incumbent.tighten(self.reduced.round_down(max(outcome.bound, beyond)))

    def neighbourhood(self, random: np.random.RandomState) -> None:
        """Keep the incumbent's options but in some groups, drawn from those that have a choice."""
        self._narrow()
        if self.alternatives() <= NEIGHBOURHOOD_ALTERNATIVES:
            return  # the whole, which wider searches see to
        sizes = np.bincount(self.candidates.group, minlength=self.instance.n_groups) - 1
        several = random.permutation(np.flatnonzero(sizes))
        drawn = several[: 1 + int(np.searchsorted(np.cumsum(sizes[several]), NEIGHBOURHOOD_ALTERNATIVES))]
        free = np.zeros(self.instance.n_groups, dtype=bool)
        free[drawn] = True
        part = self._only(self.candidates, free[self.candidates.group], favourites=False)
        outcome = beam_search(self.instance, self.dual, part, self.threshold(), width=NEIGHBOURHOOD_WIDTH)
        self.incumbent.offer(self.instance, outcome.choice)

    def alternatives(self) -> int:
        """How many options beside one of each group a better allocation may have."""
        return len(self.candidates.option) - self.instance.n_groups

    def _narrow(self) -> None:
        self.candidates = self._only(self.candidates, self.candidates.regret <= self.limit())

    def _only(self, candidates: Candidates, keep: np.ndarray, favourites: bool = True) -> Candidates:
        """Those to keep, the incumbent's options, and the favourites."""
        keep = keep | (self.incumbent.choice[candidates.group] == candidates.option)
        if favourites:
            keep |= self.dual.favourites[candidates.group] == candidates.option
        return Candidates(candidates.option[keep], candidates.regret[keep], candidates.group[keep])
