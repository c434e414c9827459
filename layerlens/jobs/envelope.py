"""The curve that no choice exceeds over a budget of memory or of step time, other budgets left aside.

Parts of these are paid once, and memory is a peak, so no curve goes through the choices themselves. Lower bounds that
add up (:mod:`layerlens.cost.floor`) have an exact concave hull at each moment, and the least of these hulls lies above
every choice.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from layerlens.config import OptimizationConfig
from layerlens.cost.floor import Moment, first_moments, floor_table
from layerlens.models import AllocationProblem, CostTable, FrontierRow, ModelSpec, UtilityTable
from layerlens.optimization import Frontier, build_problem, frontier
from layerlens.optimization.problem import MEMORY, MOMENT, ROUNDING, weights_of

LOOKED_AT = 8
"""Choices of the hull whose peaks say at which moments memory is looked at."""


def envelope(
    spec: ModelSpec,
    utilities: UtilityTable,
    costs: CostTable,
    config: OptimizationConfig,
    resource: str,
    threads: int = 1,
) -> list[FrontierRow]:
    """Points of the curve, by rising budget; in between it is straight.

    Args:
        spec, utilities, costs, config: as of ``build_problem``; costs with a recorded step. The budget of the resource
            is not used.
        resource: vram_gb or step_ms.
        threads: of the kernels.
    """
    use = costs.step
    assert use is not None
    weights = weights_of(spec, costs, config)
    names = [layer.name for layer in spec.layers]

    def hulls_of(moments: Sequence[Moment]) -> tuple[AllocationProblem, list[Frontier]]:
        problem = build_problem(spec, utilities, floor_table(costs, names, moments), config, weighed=weights)
        rows = [MOMENT.format(number) for number in range(len(moments))] if resource == MEMORY else [resource]
        return problem, [frontier(problem, row, threads=threads) for row in rows]

    moments = first_moments(use)
    problem, hulls = hulls_of(moments)
    if resource == MEMORY:
        some = (each.choice(int(point)) for each in hulls for point in _spread(len(each.budget)))
        peaks = {use.timeline(problem.entries(choice)).moment for choice in some}
        if peaks - set(moments):
            _, hulls = hulls_of([*moments, *sorted(peaks - set(moments))])
    budgets, scores = least_of([(each.budget, each.value + each.above) for each in hulls])
    return [
        FrontierRow("bound", budget, score, score, 0.0, "bound")
        for budget, score in zip((budgets / (1.0 + ROUNDING)).tolist(), scores.tolist(), strict=True)
    ]


def _spread(n_points: int) -> np.ndarray:
    return np.unique(np.linspace(0, n_points - 1, LOOKED_AT).astype(int))


def least_of(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The least of concave curves (budgets, scores), where all of them are defined: its corners.

    Each is flat beyond its last point.
    """
    start = max(float(budgets[0]) for budgets, _ in curves)
    corners = np.unique(np.concatenate([[start], *(budgets[budgets > start] for budgets, _ in curves)]))
    at = np.array([np.interp(corners, *curve) for curve in curves])
    crossings = []
    for one, other in itertools.combinations(at, 2):
        ahead = one - other
        place = np.flatnonzero(ahead[:-1] * ahead[1:] < 0.0)
        share = ahead[place] / (ahead[place] - ahead[place + 1])
        crossings.append(corners[place] + share * (corners[place + 1] - corners[place]))
    corners = np.unique(np.concatenate([corners, *crossings]))
    scores = np.array([np.interp(corners, *curve) for curve in curves]).min(axis=0)
    # Corners that lie on the line between their neighbours say nothing.
    bent = np.ones(len(corners), dtype=bool)
    slope = np.diff(scores) / np.diff(corners)
    bent[1:-1] = slope[1:] < slope[:-1]
    return corners[bent], scores[bent]
