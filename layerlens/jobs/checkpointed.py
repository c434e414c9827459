"""``training.gradient_checkpointing: auto``: how many blocks are checkpointed is a part of the choice.

A checkpointed block keeps only what goes into it, and its forward pass runs twice. Blocks are alike, and the highest
one is computed again when most is alive, so the lowest ones are taken first, and their number is what is chosen: the
problem is solved with each of a few numbers, and the fewest blocks are taken that cost next to no score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from layerlens.config import RunConfig
from layerlens.exceptions import InfeasibleError
from layerlens.jobs.find import find_allocation
from layerlens.jobs.solve import Solution, costs_of
from layerlens.models import CostTable, ModelSpec, ModelStatistics, UtilityTable

SCORE_GIVEN_UP = 0.01
"""Share of the best score that is given up for fewer checkpoints: each of them costs a forward pass of its block."""
MOST_TRIED = 9
"""Numbers of blocks that are tried first, evenly spread from none to all."""


def certified_choice(
    spec: ModelSpec,
    statistics: ModelStatistics,
    utilities: UtilityTable,
    costs: CostTable,
    config: RunConfig,
    threads: int,
    kept: float | None = None,
) -> Solution:
    """The certified choice within the budgets, the number of checkpointed blocks with it where it is to be chosen.

    ``kept`` is the share of uniform LoRA's improvement to keep, of ``find_allocation``.

    Raises:
        InfeasibleError: the budgets allow nothing.
    """
    optimization = config.optimization

    def with_costs(counted: CostTable) -> Solution:
        return find_allocation(
            spec, utilities, counted, optimization, seed=config.runtime.seed, threads=threads, kept=kept
        )

    if config.training.gradient_checkpointing != "auto":
        return with_costs(costs)
    limited = optimization.max_vram_gb is not None and statistics.step is not None
    return fewest_checkpoints(
        statistics.step.blocks if limited and statistics.step is not None else (),
        lambda chosen: with_costs(costs_of(spec, statistics, utilities.options, config, chosen) if chosen else costs),
        optimization.gap_tolerance,
    )


def fewest_checkpoints(
    blocks: Sequence[str], solve_with: Callable[[tuple[str, ...]], Solution], gap_tolerance: float
) -> Solution:
    """The answer with the fewest checkpointed blocks whose score is within ``SCORE_GIVEN_UP`` of the best one's.

    Args:
        blocks: that can be checkpointed, in the order of the model.
        solve_with: the answer with these blocks checkpointed.
        gap_tolerance: below which the answer is called optimal.

    Returns:
        its bound is that of all numbers that were tried.

    Raises:
        InfeasibleError: no number of checkpoints meets the budgets; the error is that of all blocks.
    """
    found: dict[int, Solution | None] = {}
    refused: InfeasibleError | None = None

    def value(count: int) -> float:
        nonlocal refused
        if count not in found:
            try:
                found[count] = solve_with(tuple(blocks[:count]))
            except InfeasibleError as error:
                found[count], refused = None, error
        one = found[count]
        return -math.inf if one is None else one.allocation.value

    tried = np.unique(np.linspace(0, len(blocks), min(len(blocks) + 1, MOST_TRIED)).round().astype(int)).tolist()
    best = max(map(value, tried))
    if best == -math.inf:
        assert refused is not None
        raise refused
    enough = best - SCORE_GIVEN_UP * abs(best)
    high = next(count for count in tried if value(count) >= enough)
    low = max((count for count in tried if count < high), default=-1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if value(middle) >= enough else (middle, high)
    chosen = found[high]
    assert chosen is not None
    bound = max(one.allocation.upper_bound for one in found.values() if one is not None)
    allocation = replace(chosen.allocation, upper_bound=bound)
    status = "optimal" if allocation.gap <= gap_tolerance else "feasible"
    return replace(chosen, allocation=replace(allocation, status=status))
