"""Uniform LoRA in place of a manifest's choice, so that the two can be compared with each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from layerlens.exceptions import ConfigurationError, InfeasibleError
from layerlens.jobs.explained import solution_of
from layerlens.jobs.recorded import config_of
from layerlens.jobs.solve import make_manifest
from layerlens.models import LORA, NONE, AllocationProblem, Manifest, ModelSpec, ModelStatistics
from layerlens.optimization import explain, uniform_lora
from layerlens.optimization.problem import exact_sum


def uniform_manifest(
    manifest: Manifest, spec: ModelSpec, statistics: ModelStatistics, rank: int | None = None
) -> Manifest:
    """What ``manifest`` would be with the same LoRA rank on every layer that takes it, scored and costed alike.

    Args:
        manifest: of a run or of ``optimize``.
        spec, statistics: what it was chosen by.
        rank: whether it fits the budgets or not; the largest that fits, spread over the depth, when None.

    Raises:
        ConfigurationError: no layer has this rank on offer.
        InfeasibleError: without ``rank``: no uniform LoRA fits the budgets.
        ActivationCacheError: the statistics are not those of the manifest.
    """
    solution = solution_of(manifest, spec, statistics)
    problem, optimum = solution.problem, solution.allocation
    if rank is None:
        allocation = uniform_lora(problem, optimum)
        if allocation is None:
            raise InfeasibleError("no uniform LoRA fits the manifest's budgets; give a rank, such as uniform-lora:4")
    else:
        choice = _of_rank(problem, optimum.choice, rank)
        allocation = replace(
            optimum,
            choice=choice,
            value=exact_sum(problem.value_terms(choice)),
            used=np.array([exact_sum(row) for row in problem.terms__rk(choice)]),
            status="feasible",
            solver="uniform-lora",
        )
    uniform = replace(solution, allocation=allocation, explanations=tuple(explain(problem, allocation)))
    optimization = config_of(manifest).optimization
    return make_manifest(spec, uniform, optimization, model=manifest.model, provenance=manifest.provenance)


def _of_rank(problem: AllocationProblem, otherwise: np.ndarray, rank: int) -> np.ndarray:
    """LoRA of this rank in every group that has it, "none" where a group has that, else what it had."""
    choice, ranks = np.array(otherwise), set()
    for group in range(len(problem.layers)):
        own = range(int(problem.offset[group]), int(problem.offset[group + 1]))
        by_option = {(problem.options[index].method, problem.options[index].rank): index for index in own}
        choice[group] = by_option.get((LORA, rank), by_option.get((NONE, 0), int(otherwise[group])))
        ranks |= {size for method, size in by_option if method == LORA}
    if rank not in ranks:
        offer = ", ".join(map(str, sorted(ranks))) or "none"
        raise ConfigurationError(f"uniform-lora: rank {rank} is not on offer; the manifest's LoRA ranks are {offer}")
    return choice
