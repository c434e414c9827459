"""The upper concave hull of value over one budget where costs are paid once.

The best choice at a price is a corner of the hull. Between two corners, the price at which both score alike finds a
third or proves that there is none (Eisner & Severance 1976).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from layerlens.exceptions import OptimizationError
from layerlens.kernels._knapsack import Instance
from layerlens.models import AllocationProblem
from layerlens.optimization.problem import exact_sum
from layerlens.optimization.structure import build_structure, check_charges

# A corner less than this share of the values' range above the line between its neighbours is left out.
FLAT = 1e-7
# So many corners, then the hull is as fine as anyone can use.
MAX_CORNERS = 4_000
# The price at which nothing is bought that can be left, against the largest slope between the ends.
DEAR = 1e9


@dataclass(frozen=True)
class Corner:
    """A choice, its cost and its value, charges included."""

    cost: float
    value: float
    choice: np.ndarray


def corners(problem: AllocationProblem, row: int, threads: int) -> tuple[list[Corner], float]:
    """The hull's corners by rising cost, and how far it may lie above the lines between them.

    Raises:
        OptimizationError: no choice is possible at all.
    """
    depth = problem.depth
    if depth is not None:
        depth = dataclasses.replace(depth, cost__sr=np.asarray(depth.cost__sr)[:, [row]])
    single = dataclasses.replace(
        problem,
        cost__ro=np.ascontiguousarray(problem.cost__ro[[row]]),
        resources=(problem.resources[row],),
        capacity=problem.capacity[[row]],
        budget=problem.budget[[row]],
        base=problem.base[[row]],
        charges=tuple(dataclasses.replace(c, cost__r=np.asarray(c.cost__r)[[row]]) for c in problem.charges),
        depth=depth,
    )
    check_charges(single)
    structure = build_structure(single)
    value = structure.value.copy()
    value[structure.impossible] = -np.inf
    instance = Instance(structure.offset, value, [structure.cost__ro[0]], [1.0])

    def best(price: float) -> tuple[float, Corner]:
        favourites, scores, _ = instance.score_groups(np.array([price]), threads)
        nodes, modes = structure.charges.score_modes(scores)
        mode = int(np.argmax(modes))
        if modes[mode] == -np.inf:
            raise OptimizationError("no choice is possible: every option is excluded by the depth of another")
        items = structure.charges.items_of(nodes, mode)
        runs = items[structure.group[items] >= 0]
        choice = np.empty(len(problem.layers), dtype=np.int64)
        choice[structure.group[runs]] = favourites[runs]
        corner = Corner(exact_sum(single.terms__rk(choice)[0]), exact_sum(single.value_terms(choice)), choice)
        return corner.value - price * corner.cost, corner

    _, dearest = best(0.0)
    spread = float(np.ptp(problem.value)) or 1.0
    smallest = float(np.min(structure.cost__ro[0], where=structure.cost__ro[0] > 0.0, initial=np.inf))
    _, cheapest = best(DEAR * spread / smallest if np.isfinite(smallest) else 0.0)
    if dearest.cost <= cheapest.cost:
        return [dearest], 0.0
    allowed = FLAT * max(abs(dearest.value - cheapest.value), 0.0)
    found = [cheapest]
    pending = [(cheapest, dearest)]
    above = 0.0
    while pending:
        left, right = pending.pop()
        if right.cost <= left.cost or right.value <= left.value:
            found.append(right) if right.value > left.value else None
            continue
        slope = (right.value - left.value) / (right.cost - left.cost)
        score, middle = best(slope)
        rise = score - (left.value - slope * left.cost)
        between = left.cost < middle.cost < right.cost
        if rise <= allowed or not between or len(found) + len(pending) >= MAX_CORNERS:
            above = max(above, rise)
            found.append(right)
            continue
        pending += [(middle, right), (left, middle)]
    return found, above
