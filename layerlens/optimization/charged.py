"""Charged problems at given prices: what the best choice of each mode is, and what that proves.

A *mode* is a lowest stage and a set of switches (see :mod:`structure`). For prices p every allocation x of mode k obeys

    value(x) <= p·C + score_k(p)

so the largest of the modes' least bounds, each at prices of its own, bounds the whole problem.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from layerlens.kernels._knapsack import Instance, minimise_dual
from layerlens.models import AllocationProblem
from layerlens.optimization.lagrangian import DUAL_TOLERANCE, MAX_EVALUATIONS, Dual, first_multipliers
from layerlens.optimization.problem import exact_sum
from layerlens.optimization.reduced import UNIT_ROUNDOFF, Reduced, reduce
from layerlens.optimization.structure import Structure, build_structure

# First half-width of the box around known prices, as a share of them.
NEAR = 0.02


@dataclass(frozen=True)
class State:
    """All items and modes at one price.

    Args:
        price: float64 [r].
        favourites: int64 [items], the best option of each item.
        best: float64 [items], its score.
        value: float64 [items + nodes], of the graph.
        score: float64 [modes].
    """

    price: np.ndarray
    favourites: np.ndarray
    best: np.ndarray
    value: np.ndarray
    score: np.ndarray


class Charged:
    """A problem with charges, its items scaled for the kernels."""

    def __init__(self, problem: AllocationProblem, threads: int) -> None:
        self.problem, self.threads = problem, threads
        self.structure: Structure = build_structure(problem)
        flat = dataclasses.replace(
            problem,
            offset=self.structure.offset,
            value=self.structure.value,
            cost__ro=self.structure.cost__ro,
            charges=(),
            depth=None,
        )
        reduced = reduce(flat)
        value = reduced.instance.value.copy()
        value[self.structure.impossible] = -np.inf
        old = reduced.instance
        instance = Instance(old.offset, value, old.cost_rows, old.capacity)
        self.reduced: Reduced = dataclasses.replace(reduced, instance=instance)

    @property
    def instance(self) -> Instance:
        return self.reduced.instance

    def at(self, price: np.ndarray) -> State:
        favourites, best, _ = self.instance.score_groups(price, self.threads)
        value, score = self.structure.charges.score_modes(best)
        return State(price, favourites, best, value, score)

    def bound(self, price: np.ndarray, score: float) -> float:
        """A proved upper bound on all allocations of a mode, as ``Reduced.bound``."""
        return self.bounds(price, [score])[0]

    def bounds(self, price: np.ndarray, scores: Sequence[float]) -> list[float]:
        """``bound`` of several modes.

        The scores of a choice are added up by at most n additions, each of which errs by u of what is added up, which
        for an allocation that fits is at most n·|v| + p·C. Costs and values of items are correctly rounded sums: one u
        more of each.
        """
        n, m = self.instance.n_groups, len(price)
        priced = exact_sum(price * self.instance.capacity)
        size = n * self.reduced.largest_value + priced
        margin = (n + 2 * m + 14) * UNIT_ROUNDOFF * size + (n + 1) * (m + 1) * 2.0**-1074
        round_down = self.reduced.round_down
        return [-math.inf if score == -math.inf else round_down(exact_sum((score, priced, margin))) for score in scores]

    def rounding(self, price: np.ndarray) -> float:
        """How far a regret, added up over nodes of the graph, can lie from the exact one; as ``Reduced.rounding``."""
        size = self.reduced.largest_value + float(np.sum(price * self.instance.capacity))
        return (64.0 + self.instance.n_groups) * UNIT_ROUNDOFF * size

    def minimise(self, mode: int, start: np.ndarray | None = None) -> State:
        """The prices of the least bound of one mode, or of all (-1), from the prices ``start`` on."""
        capacity = self.instance.capacity
        if start is None:
            free = self.at(np.zeros(self.instance.n_resources))
            totals = self.totals(free, int(np.argmax(free.score)) if mode < 0 else mode)
            first, radius = first_multipliers(self.instance, totals)
        else:
            first = start * capacity
            radius = NEAR * (first + float(first.mean()))
            radius = np.where(radius > 0.0, radius, 1.0)
        found, _, _ = minimise_dual(
            self.instance, first, radius, DUAL_TOLERANCE, MAX_EVALUATIONS, self.threads,
            charges=self.structure.charges, mode=mode,
        )  # fmt: skip
        return self.at(found / capacity)

    def totals(self, state: State, mode: int) -> np.ndarray:
        """As of ``Instance.score_groups``: score, value and uses of the best choice of a mode."""
        chosen = state.favourites[self.items(state, mode)]
        instance = self.instance
        uses = [float(row[chosen].sum()) for row in instance.cost_rows]
        return np.array([state.score[mode], float(instance.value[chosen].sum()), *uses])

    def items(self, state: State, mode: int) -> np.ndarray:
        """Items of the best choice of a mode."""
        found: np.ndarray = self.structure.charges.items_of(state.value, mode)
        return found

    def choice(self, state: State, items: np.ndarray) -> np.ndarray:
        """int64 [n_groups], the options of a choice made of these items."""
        group = self.structure.group[items]
        runs = items[group >= 0]
        choice = np.empty(len(self.problem.layers), dtype=np.int64)
        choice[self.structure.group[runs]] = state.favourites[runs]
        return choice

    def allowed_runs(self, mode: int) -> np.ndarray:
        """bool [n_runs]: the runs of options that are possible in a mode, charges aside."""
        structure = self.structure
        s, w = divmod(mode, structure.n_switches)
        stage = structure.stage__g[structure.group[: structure.n_runs]]
        reached = (stage < 0) | (stage >= s)
        fine = np.where(reached, ~structure.below__i, ~structure.reaches__i)
        on = structure.set_charges[w]
        switches = np.array(sorted(set().union(*structure.set_charges) - on), dtype=np.int64)
        return fine & ~np.isin(structure.cause__ik, switches).any(axis=1)

    def pattern(self, state: State, mode: int, items: np.ndarray) -> tuple[Reduced, np.ndarray, Dual]:
        """The plain problem that is left when exactly the charges of ``items`` are paid.

        Returns the problem, which of the items' options each of its options is, and its dual at the state's prices.
        """
        structure = self.structure
        paid = items[structure.group[items] < 0]
        is_open = np.zeros(len(structure.group) + 1, dtype=bool)
        is_open[paid] = True
        is_open[-1] = True  # the padding
        cause = np.where(structure.cause__ik < 0, len(structure.group), structure.n_runs + structure.cause__ik)
        runs = np.flatnonzero(self.allowed_runs(mode) & is_open[cause].all(axis=1))
        begin, end = structure.offset[runs], structure.offset[runs + 1]
        sizes = end - begin
        option = np.repeat(begin - np.concatenate(([0], np.cumsum(sizes)[:-1])), sizes) + np.arange(int(sizes.sum()))
        per_group = np.bincount(structure.group[runs], weights=sizes, minlength=len(self.problem.layers)).astype(
            np.int64
        )
        option = np.concatenate((option, structure.offset[paid]))
        offset = np.cumsum(np.concatenate(([0], per_group, np.ones(len(paid), dtype=np.int64))))
        old = self.instance
        instance = Instance(offset, old.value[option], [row[option] for row in old.cost_rows], old.capacity)
        reduced = dataclasses.replace(self.reduced, instance=instance)
        favourites, best, totals = instance.score_groups(state.price, self.threads)
        return reduced, option, Dual(state.price, reduced.bound(state.price, best), favourites, best, totals[:1])


def option_regrets(charged: Charged, state: State, mode: int) -> np.ndarray:
    """float64 [n_options]: how far below the mode's best score the best choice with each option lies.

    Infinity where no choice of the mode has the option.

    From the roots down: what is lost where a node takes a row, least over the ways that lead there.
    """
    structure, graph, instance = charged.structure, charged.structure.charges, charged.instance
    s, w = divmod(mode, structure.n_switches)
    n_items = len(structure.group)
    value, lost = state.value, np.full(len(state.value), np.inf)
    below = (graph.stage >= 0) & (graph.stage < s)
    lost[graph.root[np.arange(len(graph.stage)), w, below.astype(np.int64)]] = 0.0
    for node in range(len(graph.node_begin) - 2, -1, -1):
        here = lost[n_items + node]
        if here == np.inf:
            continue
        for k in range(graph.node_begin[node], graph.node_begin[node + 1]):
            children = graph.child[graph.row_begin[k] : graph.row_begin[k + 1]]
            through = here + (value[n_items + node] - float(value[children].sum()))
            if through < np.inf:
                lost[children] = np.minimum(lost[children], through)
    score = instance.value.copy()
    for r, row in enumerate(instance.cost_rows):
        score = score - state.price[r] * row
    n_options = len(charged.problem.options)
    item = np.searchsorted(structure.offset, np.arange(n_options), side="right") - 1
    with np.errstate(invalid="ignore"):  # of options that cannot fit in an item of such options
        found: np.ndarray = lost[item] + (state.best[item] - score[:n_options])
    return np.where(np.isnan(found), np.inf, found)


def true_value(problem: AllocationProblem, choice: np.ndarray) -> float:
    """Correctly rounded."""
    return exact_sum(problem.value_terms(choice))


def true_use(problem: AllocationProblem, choice: np.ndarray) -> np.ndarray:
    """float64 [r], correctly rounded."""
    return np.array([exact_sum(row) for row in problem.terms__rk(choice)])


def keeps(problem: AllocationProblem, choice: np.ndarray) -> bool:
    """Whether ``choice`` is an answer: within every budget, and nothing that its depth forbids."""
    return problem.allowed(choice) and bool(np.all(true_use(problem, choice) <= problem.capacity))
