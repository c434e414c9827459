"""The answer of a problem with charges and its certificate: the modes one by one, until none can be better.

1. Prices that minimise the bound over all modes at once; they bound every mode.
2. Modes by falling bound: prices of their own, and an allocation that pays the charges that the prices suggest.
3. Each mode that may still be better, as a plain problem of joint choices (:mod:`compounds`): beam searches, first
   quick ones in all modes, then those that last. Where all joint choices that matter are listed, they prove.
4. What is left goes to CP-SAT, which knows charges and stages as indicators.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from layerlens.models import AllocationProblem
from layerlens.optimization.charged import Charged, State, keeps, true_value
from layerlens.optimization.compounds import build_compounds
from layerlens.optimization.core_search import Incumbent, find_fitting, search_core
from layerlens.optimization.lagrangian import guided_search
from layerlens.optimization.long_search import Deadline, search_until
from layerlens.optimization.problem import exact_sum, ldexp
from layerlens.optimization.structure import check_charges

# Modes that get prices of their own, modes that are searched at length, and modes in which a first allocation is
# sought. Large problems look at fewer modes: as many as so many numbers allow, each mode looking at all some 40 times.
PRICED_MODES, SEARCHED_MODES, STARTED_MODES = 48, 4, 3
PRICED_NUMBERS, LOOKS = 1_600_000_000, 40
# The first allocations are made of joint choices within this share of the bound, and of the best choices at the prices
# times these factors: frugal ones, from which there is something to give back, and generous ones.
STARTED_SHARE, PRICE_FACTORS = 0.02, (0.25, 0.5, 0.8, 1.25, 2.0, 4.0, 1e3)
# A cost so near its budget, as a share of it, is summed exactly.
NEAR_LIMIT = 1e-9
# Joint choices that quick searches list, at least and for each part, and those that prove.
QUICK_COMPOUNDS, PART_COMPOUNDS, ALL_COMPOUNDS = 1_500, 6, 20_000
# A mode whose bound lies above the others by so much of the tolerance gets no prices of its own at first.
ENOUGH = 0.1
# Where the first allocation is further from its bound, the charges that the prices suggest are tried as they are.
FAR = 0.005

Report = Callable[[str, float | None, float], None]


@dataclass
class _Mode:
    """What is known of one mode, in the instance's units.

    Args:
        index: which mode.
        bound: the least proved so far, by prices or by a search.
        dual: what the prices of ``state`` prove; regrets count from there.
        own: the prices were sought for this mode.
    """

    index: int
    bound: float
    dual: float
    state: State
    own: bool = False


@dataclass(frozen=True)
class Refined:
    """The better of an old and a new allocation, and the better bound, in the problem's units."""

    choice: np.ndarray
    value: float
    bound: float


@dataclass(frozen=True)
class ChargedAnswer:
    """The best allocation found (None: none), a bound on all, and the prices of the budgets.

    Args:
        choice: int64 [n_groups].
        value, bound: in the problem's units.
        multipliers: float64 [r], value per unit.
        stages: which searches ran.
    """

    choice: np.ndarray | None
    value: float
    bound: float
    multipliers: np.ndarray
    stages: tuple[str, ...]


class ChargedSearch:
    """The search; ``choice`` and ``value`` are the best so far."""

    def __init__(self, problem: AllocationProblem, tolerance: float, seed: int, threads: int, report: Report) -> None:
        self.problem, self.tolerance, self.seed, self.threads, self.report = problem, tolerance, seed, threads, report
        self.charged = Charged(problem, threads)
        self.reduced = self.charged.reduced
        self.choice: np.ndarray | None = None
        self.value = -math.inf
        self.stages = ["greedy-lagrangian"]
        m = self.charged.instance.n_resources
        numbers = LOOKS * (m + 1) * len(problem.options)
        self.few = max(QUICK_COMPOUNDS, PART_COMPOUNDS * len(self.charged.structure.charges.stage))
        self.most_modes = max(2, min(PRICED_MODES, PRICED_NUMBERS // numbers))
        start = self.charged.at(np.zeros(m))
        self.possible = bool(np.any(np.isfinite(start.score)))
        if not self.possible:
            self.modes: list[_Mode] = []
            self.joint = start
            return
        state = start
        if m and not self._free(start):
            state = self.charged.minimise(-1)
        self.joint = state
        self.modes = [
            _Mode(index, bound, bound, state)
            for index, bound in enumerate(self.charged.bounds(state.price, state.score.tolist()))
            if bound > -math.inf
        ]
        self.report("multipliers", None, self.bound)

    def _free(self, start: State) -> bool:
        """Whether the best choice without budgets keeps them."""
        mode = int(np.argmax(start.score))
        choice = self.charged.choice(start, self.charged.items(start, mode))
        return keeps(self.problem, choice)

    @property
    def scaled(self) -> float:
        """The value in the instance's units."""
        return ldexp(self.value, self.reduced.value_exponent) if self.choice is not None else -math.inf

    @property
    def bound(self) -> float:
        """On all modes, in the problem's units."""
        top = max((mode.bound for mode in self.modes), default=-math.inf)
        return max(self.value, ldexp(top, -self.reduced.value_exponent)) if top > -math.inf else self.value

    def closed(self) -> bool:
        return self.choice is not None and self.bound - self.value <= self.tolerance * abs(self.bound)

    def open_modes(self) -> list[_Mode]:
        """Those that may have something better, the highest bound first."""
        if self.choice is None:
            return sorted(self.modes, key=lambda mode: (-mode.bound, mode.index))
        least = self.scaled + self.tolerance * abs(self.scaled)
        return sorted((mode for mode in self.modes if mode.bound > least), key=lambda mode: (-mode.bound, mode.index))

    def offer(self, choice: np.ndarray | None) -> bool:
        """Take an allocation if it keeps the budgets and is better."""
        if choice is None:
            return False
        value = true_value(self.problem, choice)
        if (self.choice is not None and value <= self.value) or not keeps(self.problem, choice):
            return False
        self.choice, self.value = choice, value
        return True

    def start(self) -> None:
        """Prices for the best modes, and allocations in the first of them."""
        self.price()
        for thorough in (False, True):
            for mode in self.open_modes()[:STARTED_MODES]:
                if self.choice is None:
                    self._start_in(mode, thorough)
        if self.choice is not None:
            self.report("guided search", self.value, self.bound)

    def price(self) -> None:
        """Prices for the best modes.

        Prices of one mode often prove enough about its neighbours, so the best mode without prices of its own comes
        next, until none lies above those that have them, or so little that it does not matter.
        """
        own = -math.inf
        for _ in range(self.most_modes):
            top = self.open_modes()[0] if self.modes else None
            if top is None or top.own or top.bound - own <= ENOUGH * self.tolerance * abs(top.bound):
                break
            self._price(top)
            own = max(own, top.bound)

    def _price(self, mode: _Mode) -> None:
        """Prices of its own for a mode; what they say of the others counts, too."""
        mode.own = True
        if not self.charged.instance.n_resources or not self.joint.price.any():
            return
        state = self.charged.minimise(mode.index, mode.state.price)
        bounds = self.charged.bounds(state.price, state.score[[each.index for each in self.modes]].tolist())
        for each, bound in zip(self.modes, bounds, strict=True):
            if bound < each.dual:
                each.dual, each.state = bound, state
                each.bound = min(each.bound, bound)

    def _start_in(self, mode: _Mode, thorough: bool = False) -> None:
        """An allocation that pays the charges of the best choice at the mode's prices."""
        items = self.charged.items(mode.state, mode.index)
        if self.offer(self.charged.choice(mode.state, items)) and not mode.state.price.any():
            return
        if not self.charged.instance.n_resources:
            return
        also = [self._at_prices(mode, factor) for factor in PRICE_FACTORS]
        for choice in also:
            self.offer(choice)
        limit = STARTED_SHARE * abs(mode.dual)
        compounds = build_compounds(
            self.charged, mode.state, mode.index, mode.dual, limit, self.few, [c for c in also if c is not None]
        )
        if compounds is not None:
            joint = guided_search(compounds.reduced.instance, compounds.dual)
            if joint is not None:
                self.offer(compounds.choice(joint))
        near = self.choice is not None and mode.bound - self.scaled <= FAR * abs(mode.bound)
        if near and not thorough:
            return
        reduced, option, dual = self.charged.pattern(mode.state, mode.index, items)
        found = guided_search(reduced.instance, dual)
        if found is None and thorough:
            found = find_fitting(reduced, dual, self.threads)
        if found is not None:
            self.offer(option[found][: len(self.problem.layers)])

    def _at_prices(self, mode: _Mode, factor: float) -> np.ndarray | None:
        """The mode's best choice at its prices times a factor; None where the prices are too high to tell."""
        with np.errstate(over="ignore"):  # such prices are too high to tell
            price = factor * mode.state.price
        state = self.charged.at(price)
        if not np.isfinite(state.score[mode.index]):
            return None
        return self.charged.choice(state, self.charged.items(state, mode.index))

    def search(self, *, quick: bool, prove: bool) -> None:
        """Beam searches on the joint choices of each mode that may still be better."""
        if self.closed() or self.choice is None or not self.charged.instance.n_resources:
            return
        self.stages.append("beam-search")
        for mode in self.open_modes()[: min(self.most_modes, PRICED_MODES if quick else SEARCHED_MODES)]:
            if self.closed():
                return
            if mode.bound <= self.scaled:
                continue
            self._search_in(mode, quick, prove)
            self.report("beam search", self.value, self.bound)

    def search_until(self, deadline: Deadline) -> None:
        """Go on in the modes that may still be better, one after the other, until the deadline."""
        while not self.closed() and not deadline.is_set() and self.charged.instance.n_resources:
            modes = self.open_modes()[:SEARCHED_MODES]
            before = [mode.bound for mode in modes], self.value
            share = (deadline.at - time.monotonic()) / max(len(modes), 1)
            for mode in modes:
                until = Deadline(min(deadline.at, time.monotonic() + share))
                self._search_in(mode, quick=False, prove=False, deadline=until)
            self.stages.append("long-search")
            if before == ([mode.bound for mode in modes], self.value) and not deadline.is_set():
                return

    def _search_in(self, mode: _Mode, quick: bool, prove: bool, deadline: Deadline | None = None) -> None:
        if not mode.own:
            self._price(mode)
        if mode.bound <= self.scaled:
            return
        limit = mode.dual - self.scaled + self.charged.rounding(mode.state.price)
        own = self.choice if self._mode_of(self.choice) == mode.index else None
        most = self.few if quick else max(self.few, ALL_COMPOUNDS)
        compounds = build_compounds(
            self.charged, mode.state, mode.index, mode.dual, limit, most, () if own is None else (own,)
        )
        if compounds is None:
            return
        instance = compounds.reduced.instance
        first = compounds.dual.favourites
        if own is not None:
            index = {options: place for place, options in enumerate(compounds.options)}
            part = self.charged.structure.part__g
            first = np.array(
                [index[tuple(np.sort(own[part == p]).tolist())] for p in range(instance.n_groups - 1)]
                + [len(compounds.options) - 1]
            )
        before = self.scaled
        incumbent = Incumbent(first, before, max(before, mode.bound))
        known = compounds.reduced, compounds.dual, incumbent, self.tolerance, self.seed
        if deadline is None:
            search_core(*known, prove, self.threads, quick=quick)
        else:
            search_until(*known, deadline)
        found = incumbent.value > before and self.offer(compounds.choice(incumbent.choice))
        beyond = -math.inf
        if compounds.limit < math.inf:
            beyond = mode.dual - compounds.limit + self.charged.rounding(mode.state.price)
        bound = self.reduced.round_down(max(incumbent.bound, beyond))
        mode.bound = min(mode.bound, max(bound, before))
        if found:
            self.report("beam search", self.value, self.bound)

    def take(self, refined: Refined | None) -> None:
        """What CP-SAT found and proved of all modes that were open."""
        if refined is None:
            return
        self.stages.append("cp-sat")
        self.offer(refined.choice)
        bound = ldexp(refined.bound, self.reduced.value_exponent)
        for mode in self.modes:
            mode.bound = min(mode.bound, bound)
        self.report("cp-sat", self.value, self.bound)

    def _mode_of(self, choice: np.ndarray | None) -> int:
        structure = self.charged.structure
        if choice is None:
            return -1
        stage = self.problem.lowest_stage(choice)
        s = structure.n_stages if stage is None else stage
        on = tuple(sorted(structure.switched.intersection(self.problem.paid(choice))))
        return s * structure.n_switches + structure.sets.index(on) if on in structure.sets else -1

    def answer(self) -> ChargedAnswer:
        top = self.open_modes()[0].state if self.choice is None and self.modes else self._best_state()
        multipliers = np.zeros(len(self.problem.resources))
        with np.errstate(over="ignore"):
            multipliers[self.reduced.rows] = np.ldexp(
                top.price, self.reduced.scale_exponents - self.reduced.value_exponent
            )
        return ChargedAnswer(self.choice, self.value, self.bound, multipliers, tuple(dict.fromkeys(self.stages)))

    def _best_state(self) -> State:
        """Prices of the mode of the answer."""
        own = self._mode_of(self.choice)
        return next((mode.state for mode in self.modes if mode.index == own), self.joint)


def stage_bounds(problem: AllocationProblem, threads: int) -> list[float]:
    """What prices prove of the allocations with each lowest stage, and of those that reach none, which come last."""
    check_charges(problem)
    search = ChargedSearch(problem, 0.0, 0, threads, lambda stage, value, bound: None)
    search.price()
    structure = search.charged.structure
    found = [-math.inf] * (structure.n_stages + 1)
    for mode in search.modes:
        stage = mode.index // structure.n_switches
        found[stage] = max(found[stage], ldexp(mode.bound, -search.reduced.value_exponent))
    return found


def effective(problem: AllocationProblem) -> AllocationProblem:
    """The plain problem in which each option pays its charges by itself.

    Where every layer can be left alone at no cost, what fits alone there is what fits alone in the charged problem.
    Elsewhere the charges are left out, so that nothing is refused that may be possible.
    """
    causes, cost__ro = problem.causes, problem.cost__ro
    group__o = np.repeat(np.arange(len(problem.layers)), np.diff(problem.offset))
    free = ~np.any(cost__ro, axis=0) & (np.diff(causes.start) == 0) & ~problem.reaches__o
    if np.all(np.logical_or.reduceat(free, problem.offset[:-1])):
        added = np.zeros_like(cost__ro)
        if len(causes.charge):
            cost__cr = np.array([charge.cost__r for charge in problem.charges], dtype=np.float64)
            for row, cost__c in zip(added, cost__cr.T, strict=True):
                row += np.bincount(causes.option, weights=cost__c[causes.charge], minlength=len(row))
        if problem.depth is not None:
            reaches = problem.reaches__o
            stage = np.asarray(problem.depth.stage__g)[group__o[reaches]]
            added[:, reaches] += np.asarray(problem.depth.cost__sr, dtype=np.float64)[stage].T
        summed = cost__ro + added
        # What is near its limit is summed exactly, so that nothing that fits is refused.
        near = np.abs(summed - problem.capacity[:, None]) <= NEAR_LIMIT * np.abs(problem.capacity[:, None])
        for r, option in zip(*np.nonzero(near & (added > 0.0)), strict=True):
            stage_cost = []
            if problem.depth is not None and problem.reaches__o[option]:
                stage_cost = [float(problem.depth.cost__sr[problem.depth.stage__g[group__o[option]]][r])]
            own = [float(problem.charges[charge].cost__r[r]) for charge in causes.of(int(option))]
            summed[r, option] = exact_sum([float(cost__ro[r, option]), *own, *stage_cost])
        cost__ro = summed
    return dataclasses.replace(problem, cost__ro=cost__ro, charges=(), depth=None)
