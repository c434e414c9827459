"""One beam search over a set of candidates: what the kernel needs, and what its answer proves.

The kernel counts costs in integers (held in doubles, sums below 2**53), so that it recognises equal states. Costs are
multiplied by a power of two and rounded down, and so is what the fixed groups leave of each capacity: whatever fits in
floats fits in integers, which keeps the kernel's bound valid. What it proposes is checked against the budgets exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from layerlens.kernels._knapsack import Core, Instance
from layerlens.optimization.lagrangian import Candidates, CoreProblem, Dual, core_problem, exact_use, fits

COST_SUM_BITS = 51
# As a power of two: larger ones are no double.
LARGEST_SCALE = 1000


@dataclass(frozen=True)
class BeamOutcome:
    """What one search found.

    Args:
        choice: int64 [g] of the whole instance; None if nothing that beats the threshold and fits was found.
        bound: no allocation made of the candidates has a larger value.
        exhaustive: no state was dropped for lack of width, so ``bound`` is the best value or the threshold.
        work: about how many multiplications it took, a measure of time that is the same on every machine.
    """

    choice: np.ndarray | None
    bound: float
    exhaustive: bool
    work: int


def beam_search(
    instance: Instance, dual: Dual, candidates: Candidates, threshold: float, *, width: int, seed: int = 0
) -> BeamOutcome:
    """Search ``candidates`` for an allocation worth more than ``threshold`` (in the instance's units).

    Every group must have a candidate, and groups with several must have their favourite among them.
    """
    core = core_problem(instance, candidates)
    open_ = np.zeros(instance.n_groups, dtype=bool)
    if core is not None:
        open_[core.groups] = True
    fixed = candidates.option[~open_[candidates.group]]
    fixed_value = math.fsum(instance.value[fixed])
    if core is None:  # there is a single allocation
        found_it = fixed_value > threshold and fits(instance, fixed)
        return BeamOutcome(fixed if found_it else None, fixed_value, True, 0)
    integers, scale = _integer_core(instance, core, fixed)
    favourites = np.searchsorted(core.option, dual.favourites[core.groups])
    local = np.zeros(len(core.groups), dtype=np.int64)
    found, bound, truncations, work = integers.beam_search(
        dual.price / scale, favourites, threshold - fixed_value, local, width, seed=seed
    )
    choice = None
    if found > -math.inf:
        choice = np.empty(instance.n_groups, dtype=np.int64)
        choice[candidates.group[~open_[candidates.group]]] = fixed
        choice[core.groups] = core.option[local]
        if not fits(instance, choice):
            choice = None
    # The two roundings of `threshold - fixed_value` and of this sum are at most one unit in the last place each.
    bound = bound + fixed_value
    bound += 4.0 * 2.0**-53 * (abs(bound) + abs(fixed_value) + abs(threshold))
    return BeamOutcome(choice, bound, truncations == 0, work)


def _integer_core(instance: Instance, core: CoreProblem, fixed: np.ndarray) -> tuple[Core, np.ndarray]:
    """The core with integer costs, and the power of two of each resource that scaled it.

    ``fixed`` holds the options of the groups outside the core.
    """
    m = instance.n_resources
    first = core.core.offset[:-1]
    cost__cr = np.empty_like(core.core.cost__cr)
    capacity, scale = np.empty(m), np.empty(m)
    used = exact_use(instance, fixed)
    for r in range(m):
        column = core.core.cost__cr[:, r]
        most = math.fsum(np.maximum.reduceat(column, first))
        scale[r] = math.ldexp(1.0, min(COST_SUM_BITS - math.frexp(most)[1], LARGEST_SCALE)) if most > 0.0 else 1.0
        cost__cr[:, r] = np.floor(column * scale[r])
        # What rounds to the capacity fits; the sum of the fixed uses is known to far less than one unit.
        limit = float(instance.capacity[r])
        room = Fraction(limit) + Fraction(math.ulp(limit)) / 2 - Fraction(used[r, 0]) - Fraction(used[r, 1])
        units = math.floor(room * Fraction(scale[r])) + 1
        capacity[r] = float(min(units, 2**COST_SUM_BITS))
    return Core(core.core.offset, core.core.value, cost__cr, capacity), scale
