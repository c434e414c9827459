"""Value as a function of one budget: the whole curve at once, and certified allocations at chosen budgets."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerlens.exceptions import OptimizationError
from layerlens.kernels._knapsack import group_hulls
from layerlens.models import Allocation, AllocationProblem
from layerlens.optimization.charged_frontier import corners
from layerlens.optimization.solver import solve


@dataclass(frozen=True)
class Frontier:
    """The upper concave hull of value over one budget, without the other budgets.

    Point 0 is the best of the cheapest allocations. Each later point changes one option. The allocation of a point is
    optimal for the budget that it uses, and the line between two points is an upper bound in between.

    Args:
        resource: the resource whose budget varies.
        budget: float64 [k], increasing, base included: the smallest budget that allows the point.
        value: float64 [k], increasing, with decreasing slopes.
        option: int64 [k], the option that point k switches its group to; entry 0 is -1.
        first: int64 [n_groups], the options of point 0.
        offset: int64 [n_groups + 1], as in the problem.
        choices: the options of every point, if costs are paid once and a point changes several options. ``option`` is
            then the one that changes the value most. Empty otherwise.
        above: largest distance of the hull above the lines between its points.
    """

    resource: str
    budget: np.ndarray
    value: np.ndarray
    option: np.ndarray
    first: np.ndarray
    offset: np.ndarray
    choices: tuple[np.ndarray, ...] = ()
    above: float = 0.0

    def choice(self, point: int) -> np.ndarray:
        """The options of one point, int64 [n_groups]."""
        if self.choices:
            return self.choices[point]
        choice = self.first.copy()
        switched = self.option[1 : point + 1]
        # Where a group is switched several times, the last one stays.
        choice[np.searchsorted(self.offset, switched, side="right") - 1] = switched
        return choice

    def upper_bound(self, budget: float) -> float:
        """Upper bound of the value of every allocation within ``budget``, up to the rounding of the sums (1e-12).

        Raises:
            OptimizationError: the budget is below that of point 0.
        """
        if budget < self.budget[0]:
            raise OptimizationError(
                f"{self.resource}: a budget of {budget:g} allows nothing; the least is {self.budget[0]:g}"
            )
        return float(np.interp(budget, self.budget, self.value)) + self.above


def frontier(problem: AllocationProblem, resource: str, *, threads: int = 1) -> Frontier:
    """The whole budget-to-value curve of one resource, exact on the convex hull, in O(N log N).

    Each group's options on its concave hull of value over cost give steps of falling slope; all steps sorted by slope
    are the hull of the whole problem (the LP relaxation of the multiple-choice knapsack: Sinha & Zoltners 1979).

    Raises:
        OptimizationError: the problem has no budget on ``resource``.
    """
    row = _row(problem, resource)
    if problem.charged:
        return _charged_frontier(problem, row, threads)
    cost = problem.cost__ro[row]
    hull, length = group_hulls(problem.offset, problem.value, cost, threads)
    begin = np.concatenate(([0], np.cumsum(length)[:-1]))
    first = hull[begin]
    is_step = np.ones(len(hull), dtype=bool)
    is_step[begin] = False
    step = np.flatnonzero(is_step)
    more_cost = cost[hull[step]] - cost[hull[step - 1]]
    more_value = problem.value[hull[step]] - problem.value[hull[step - 1]]
    # Stable, so that steps of equal slope keep the order of groups, and within a group their own.
    order = _stable_order(-_falling(more_value / more_cost, is_step, step))
    return Frontier(
        resource=resource,
        budget=problem.base[row] + np.cumsum(np.concatenate(([cost[first].sum()], more_cost[order]))),
        value=np.cumsum(np.concatenate(([problem.value[first].sum()], more_value[order]))),
        option=np.concatenate(([-1], hull[step[order]])),
        first=first,
        offset=np.asarray(problem.offset),
    )


def _charged_frontier(problem: AllocationProblem, row: int, threads: int) -> Frontier:
    points, above = corners(problem, row, threads)
    switched = [-1]
    for before, after in itertools.pairwise(points):
        gains = problem.value[after.choice] - problem.value[before.choice]
        changed = np.where(after.choice != before.choice, np.abs(gains), -1.0)
        switched.append(int(after.choice[np.argmax(changed)]))
    return Frontier(
        resource=problem.resources[row],
        budget=problem.base[row] + np.array([point.cost for point in points]),
        value=np.array([point.value for point in points]),
        option=np.array(switched),
        first=points[0].choice,
        offset=np.asarray(problem.offset),
        choices=tuple(point.choice for point in points),
        above=above,
    )


def budget_sweep(
    problem: AllocationProblem, resource: str, budgets: Sequence[float], **arguments: Any
) -> list[Allocation]:
    """Solve for several budgets of one resource. The other budgets stay.

    Args:
        problem: the problem whose budget varies.
        resource: one of ``problem.resources``.
        budgets: the budgets to solve for, base included.
        arguments: keyword arguments of :func:`solve`.

    Returns:
        one allocation with its certificate for each budget.

    Raises:
        InfeasibleError: no choice fits one of the budgets.
        OptimizationError: the problem has no budget on ``resource``.
    """
    row = _row(problem, resource)
    allocations = []
    for amount in budgets:
        budget, capacity = problem.budget.copy(), problem.capacity.copy()
        budget[row] = amount
        capacity[row] = amount - problem.base[row]
        allocations.append(solve(dataclasses.replace(problem, budget=budget, capacity=capacity), **arguments))
    return allocations


def _row(problem: AllocationProblem, resource: str) -> int:
    if resource not in problem.resources:
        raise OptimizationError(
            f"the problem has no budget on {resource!r}; it has budgets on {', '.join(problem.resources)}"
        )
    return problem.resources.index(resource)


def _stable_order(key: np.ndarray) -> np.ndarray:
    """What a stable argsort returns, by NumPy's vectorised one and a repair of its ties: a third of the time."""
    order = np.argsort(key)
    in_order = key[order]
    same = in_order[1:] == in_order[:-1]
    if same.any():
        run = np.cumsum(np.concatenate(([True], ~same)))
        tied = np.flatnonzero(np.concatenate(([False], same)) | np.concatenate((same, [False])))
        order[tied] = order[tied][np.lexsort((order[tied], run[tied]))]
    return order


def _falling(slope: np.ndarray, is_step: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Slopes that do not rise within a group: rounding of nearly equal ones could otherwise swap two steps."""
    rises = np.flatnonzero(is_step[step[1:] - 1] & (slope[1:] > slope[:-1]))
    for index in rises:
        slope[index + 1] = slope[index]
    return slope
