"""The Lagrangian stage: multipliers with a proved bound, then an allocation that the multipliers guide.

For prices p >= 0 every allocation x within the capacities C obeys

    value(x) = bound(p) - p·(C - use(x)) - Σ regrets(x)

so the least bound(p) (Geoffrion 1974) says both how good an allocation can be and which options can matter: one whose
regret exceeds bound - incumbent is in no better allocation. What is left is the *core*.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from layerlens.kernels._knapsack import Core, Instance, minimise_dual, sum_use
from layerlens.optimization.reduced import Reduced

# Relative precision of the dual; the gap that rounding leaves to a proof is of this size.
DUAL_TOLERANCE = 1e-10
# How often the multipliers are sought among the options that matter near them before all options are searched.
NEARBY_ATTEMPTS = 3
MAX_EVALUATIONS = 300
# From this many groups on, the multipliers are first found on an even sample of the groups.
SAMPLED_FROM, SAMPLE_GROUPS = 4096, 1024
# Totals so near a capacity, as a share of it, are summed exactly.
NEAR_CAPACITY = 1e-12
# Candidates that repair and one-option moves look at, and moves that are tried in pairs.
SEARCH_CANDIDATES, PAIR_MOVES = 20_000, 600


@dataclass(frozen=True)
class Dual:
    """Multipliers and what they prove.

    Args:
        price: float64 [r], value per unit of each resource of the instance.
        bound: proved upper bound at ``price``, rounding included.
        favourites: int64 [g], the option with the highest score of each group.
        best: float64 [g], its score.
        bounds: float64 [k], the (unproved, plainly rounded) bounds that were evaluated on the way.
    """

    price: np.ndarray
    bound: float
    favourites: np.ndarray
    best: np.ndarray
    bounds: np.ndarray


def solve_dual(reduced: Reduced, threads: int) -> Dual:
    """Minimise bound(p) over p >= 0; many groups warm-start from a sample of them.

    Where the favourites at price 0 fit, they are the optimum and the prices stay 0.
    """
    instance = reduced.instance
    m = instance.n_resources
    favourites, best, totals = instance.score_groups(np.zeros(m), threads)
    if fits(instance, favourites):
        bound = reduced.bound(np.zeros(m), best)
        return Dual(np.zeros(m), bound, favourites, best, totals[:1])
    start, radius = first_multipliers(instance, totals)
    if instance.n_groups >= SAMPLED_FROM:
        sample = _sample(instance)
        scaled = sample.capacity / instance.capacity
        found, _, _ = minimise_dual(sample, start * scaled, radius * scaled, DUAL_TOLERANCE, MAX_EVALUATIONS, threads)
        start = found / scaled
        radius = 0.05 * (start + float(start.mean()))
        for _ in range(NEARBY_ATTEMPTS):
            start, bounds, is_minimum = _minimise_nearby(instance, start, radius, threads)
            if is_minimum:
                return _dual_at(reduced, start, bounds, threads)
            radius = 2.0 * radius
    multipliers, bounds, _ = minimise_dual(instance, start, radius, DUAL_TOLERANCE, MAX_EVALUATIONS, threads)
    return _dual_at(reduced, multipliers, bounds, threads)


def _dual_at(reduced: Reduced, multipliers: np.ndarray, bounds: np.ndarray, threads: int) -> Dual:
    price = multipliers / reduced.instance.capacity
    favourites, best, _ = reduced.instance.score_groups(price, threads)
    return Dual(price, reduced.bound(price, best), favourites, best, bounds)


def _minimise_nearby(
    instance: Instance, start: np.ndarray, radius: np.ndarray, threads: int
) -> tuple[np.ndarray, np.ndarray, bool]:
    """The dual within twice the radius, with only those options that can be favourites there: a tenth of the numbers.

    Returns multipliers, bounds, and whether the minimum lies inside: the dual is convex, so it is that of the whole.
    """
    farthest = 2.0 * radius
    price = start / instance.capacity
    favourites, best, _ = instance.score_groups(price, threads)
    option, count = instance.select_reachable(price, farthest / instance.capacity, favourites, best, threads)
    part = Instance(
        np.concatenate(([0], np.cumsum(count))),
        instance.value[option],
        [row[option] for row in instance.cost_rows],
        instance.capacity,
    )
    found, bounds, _ = minimise_dual(part, start, radius, DUAL_TOLERANCE, MAX_EVALUATIONS, threads, farthest)
    inside = (found < start + farthest) & ((found > start - farthest) | (found == 0.0))
    return found, bounds, bool(np.all(inside))


def first_multipliers(instance: Instance, totals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scaled multipliers of the size that the answer has: the free optimum's value, shared among what it exceeds."""
    excess = totals[2:] / instance.capacity
    exceeded = excess > 1.0
    size = abs(float(totals[1])) / max(float(excess[exceeded].sum()), 1.0) if exceeded.any() else 0.0
    if size == 0.0:
        size = float(np.abs(instance.value[np.isfinite(instance.value)]).max()) or 1.0
    return np.where(exceeded, 0.5 * size, 0.0), np.full(len(excess), 0.5 * size)


def _sample(instance: Instance) -> Instance:
    """Every k-th group, with its share of the capacities."""
    groups = np.arange(0, instance.n_groups, instance.n_groups // SAMPLE_GROUPS)
    sizes = np.diff(instance.offset)[groups]
    offset = np.concatenate(([0], np.cumsum(sizes)))
    options = np.repeat(instance.offset[groups] - offset[:-1], sizes) + np.arange(offset[-1])
    share = len(groups) / instance.n_groups
    return Instance(
        offset, instance.value[options], [row[options] for row in instance.cost_rows], instance.capacity * share
    )


@dataclass(frozen=True)
class Candidates:
    """Options that a search may choose, in ascending order; groups with a single one are fixed.

    Args:
        option: int64 [c], indices into the instance.
        regret: float64 [c], at the dual's prices.
        group: int64 [c], the group of each.
    """

    option: np.ndarray
    regret: np.ndarray
    group: np.ndarray


def candidates_within(instance: Instance, dual: Dual, limit: float, also: np.ndarray | None = None) -> Candidates:
    """All options with regret at most ``limit``, and those of the allocation ``also``."""
    limit = min(limit, np.finfo(np.float64).max)
    found, option, regret = instance.select_core(dual.price, dual.best, limit, 4 * instance.n_groups + 1024)
    if found > len(option):
        _, option, regret = instance.select_core(dual.price, dual.best, limit, found)
    group = np.searchsorted(instance.offset, option, side="right") - 1
    if also is not None:
        place = np.minimum(np.searchsorted(option, also), len(option) - 1)
        missing = also[option[place] != also]
        if missing.size:
            owner = np.searchsorted(instance.offset, missing, side="right") - 1
            lost = dual.best[owner] - scores(instance, dual.price, missing)
            order = np.argsort(np.concatenate((option, missing)), kind="stable")
            option = np.concatenate((option, missing))[order]
            regret = np.concatenate((regret, lost))[order]
            group = np.concatenate((group, owner))[order]
    return Candidates(option, regret, group)


def scores(instance: Instance, price: np.ndarray, option: np.ndarray) -> np.ndarray:
    """Value minus priced cost of single options, in the kernels' order of operations."""
    total = instance.value[option]
    for p, row in zip(price, instance.cost_rows, strict=True):
        total = total - p * row[option]
    return total


@dataclass(frozen=True)
class CoreProblem:
    """A core for the kernels, and which option each of its candidates is."""

    core: Core
    option: np.ndarray
    regret: np.ndarray
    groups: np.ndarray


def core_problem(instance: Instance, candidates: Candidates) -> CoreProblem | None:
    """The groups that have a choice, or None when there is none."""
    several = np.bincount(candidates.group, minlength=instance.n_groups) > 1
    open_ = several[candidates.group]
    if not open_.any():
        return None
    option, group = candidates.option[open_], candidates.group[open_]
    groups, first = np.unique(group, return_index=True)
    cost__cr = np.ascontiguousarray(np.stack([row[option] for row in instance.cost_rows], axis=1))
    core = Core(np.append(first, len(option)), instance.value[option], cost__cr, instance.capacity)
    return CoreProblem(core, option, candidates.regret[open_], groups)


def exact_use(instance: Instance, choice: np.ndarray) -> np.ndarray:
    """Use of each resource as an unevaluated sum, float64 [r, 2]; column 0 is the total rounded to nearest."""
    return np.array([sum_use(np.ascontiguousarray(row[choice])) for row in instance.cost_rows]).reshape(-1, 2)


def fits(instance: Instance, choice: np.ndarray) -> bool:
    """Whether every correctly rounded total is within its capacity.

    The kernel's sums err by far less than NEAR_CAPACITY of them; only totals that near are summed by fsum.
    """
    for row, capacity in zip(instance.cost_rows, instance.capacity.tolist(), strict=True):
        amount = row[choice]
        high, _ = sum_use(np.ascontiguousarray(amount))
        if abs(high - capacity) > NEAR_CAPACITY * capacity:
            if high > capacity:
                return False
        elif math.fsum(amount.tolist()) > capacity:
            return False
    return True


def guided_search(instance: Instance, dual: Dual) -> np.ndarray | None:
    """Repair and improve the favourites; an allocation that fits, int64 [g], or None if repair did not succeed."""
    if not dual.price.any() and fits(instance, dual.favourites):
        return dual.favourites
    limit = _search_limit(instance, dual)
    for regret_limit in (limit, np.inf) if limit < np.inf else (np.inf,):
        problem = core_problem(instance, candidates_within(instance, dual, regret_limit))
        choice = dual.favourites.copy()
        use = exact_use(instance, choice)
        if problem is None:
            return choice if fits(instance, choice) else None
        local = np.searchsorted(problem.option, choice[problem.groups])
        if problem.core.local_search(dual.price, local, use, PAIR_MOVES):
            choice[problem.groups] = problem.option[local]
            # Moves add and take away: where costs are 1e16 times apart, the kernel's running sums may be a little off.
            if fits(instance, choice):
                return choice
    return None


def _search_limit(instance: Instance, dual: Dual) -> float:
    """A regret that about SEARCH_CANDIDATES options stay within, from a sample of the groups."""
    n_options = len(instance.value)
    if n_options <= SEARCH_CANDIDATES:
        return np.inf
    groups = np.arange(0, instance.n_groups, max(1, instance.n_groups // SAMPLE_GROUPS))
    options = np.concatenate([np.arange(instance.offset[g], instance.offset[g + 1]) for g in groups])
    owner = np.searchsorted(instance.offset, options, side="right") - 1
    regret = np.sort(dual.best[owner] - scores(instance, dual.price, options))
    # Favourites are always in, so the share counts from them on.
    rank = len(groups) + int(len(options) * SEARCH_CANDIDATES / n_options)
    return float(regret[min(rank, len(regret) - 1)])
