"""Uniform LoRA as an allocation of the same problem: what everybody uses, within the same budgets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from layerlens.models import Allocation, AllocationProblem
from layerlens.models.model_spec import LORA, NONE
from layerlens.optimization.problem import exact_sum
from layerlens.utils.order import raised_evenly


def uniform_lora(problem: AllocationProblem, optimum: Allocation) -> Allocation | None:
    """The largest equal LoRA rank for all layers that fits; what is left goes to single layers, spread over the depth.

    A layer that does not have the rank on offer takes its next smaller one; a layer without LoRA stays as it is, or,
    if that is not on offer, has what the optimum has. None where no such allocation fits.

    Args:
        problem: options, budgets and scores.
        optimum: its solution, whose bound and prices hold for every allocation.
    """
    choice = uniform_choice(problem, optimum.choice)
    if choice is None:
        return None
    return allocation_of(problem, choice, optimum)


def uniform_choice(problem: AllocationProblem, otherwise: np.ndarray) -> np.ndarray | None:
    """The options of ``uniform_lora``, int64 [groups]; ``otherwise`` has one for groups with neither LoRA nor "none".

    None where no such choice fits the budgets.
    """
    ladders = [_ladder(problem, group, int(otherwise[group])) for group in range(len(problem.layers))]
    ranks = sorted({problem.options[index].rank for ladder in ladders for index in ladder})
    levels = [[_step(problem, ladder, rank) for ladder in ladders] for rank in ranks]
    steps = raised_evenly(levels, lambda level: _fits(problem, _choice(ladders, level)))
    if steps is None:
        return None
    choice = _choice(ladders, steps)
    return None if all(problem.options[index].method == NONE for index in choice) else choice


def allocation_of(problem: AllocationProblem, choice: np.ndarray, optimum: Allocation) -> Allocation:
    """Uniform LoRA with the bound and the prices of the optimum of the same problem."""
    return Allocation(
        choice=choice,
        value=exact_sum(problem.value_terms(choice)),
        upper_bound=optimum.upper_bound,
        used=_used(problem, choice),
        multipliers=optimum.multipliers,
        status="feasible",
        solver="uniform-lora",
    )


def _ladder(problem: AllocationProblem, group: int, otherwise: int) -> list[int]:
    """Options of a group from nothing to its largest LoRA rank; the one that the optimum has where LoRA is not on offer
    and nothing is neither.
    """  # fmt: skip
    own = range(int(problem.offset[group]), int(problem.offset[group + 1]))
    steps = [index for index in own if problem.options[index].method in (NONE, LORA)]
    return sorted(steps, key=lambda index: problem.options[index].rank) or [otherwise]


def _step(problem: AllocationProblem, ladder: list[int], rank: int) -> int:
    """Position in the ladder of the largest rank up to ``rank``, or of its beginning."""
    return max(0, sum(problem.options[index].rank <= rank for index in ladder) - 1)


def _choice(ladders: list[list[int]], steps: Sequence[int]) -> np.ndarray:
    return np.array([ladder[step] for ladder, step in zip(ladders, steps, strict=True)], dtype=np.int64)


def _used(problem: AllocationProblem, choice: np.ndarray) -> np.ndarray:
    return np.array([exact_sum(row) for row in problem.terms__rk(choice)])


def _fits(problem: AllocationProblem, choice: np.ndarray) -> bool:
    return bool(np.all(_used(problem, choice) <= problem.capacity))
