"""The budget-to-value curve of one resource from saved statistics: how much another thousand parameters would buy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from layerlens import vocabulary
from layerlens.config import OptimizationConfig, RunConfig
from layerlens.exceptions import ConfigurationError
from layerlens.jobs.job import job_without_model
from layerlens.jobs.result import published
from layerlens.jobs.solve import option_tables
from layerlens.manifest import write_frontier
from layerlens.manifest.frontier import TracedFrontier
from layerlens.models import RESOURCES, AllocationProblem, FrontierRow, ModelSpec, ModelStatistics
from layerlens.optimization import Frontier, budget_sweep, build_problem, frontier
from layerlens.profiling.measure import refuse_non_finite
from layerlens.profiling.statistics_file import load_statistics
from layerlens.utils.atomic import staged_directory
from layerlens.utils.progress import Progress, silent

BUDGET_FIELDS = {name: resource.budget for name, resource in vocabulary.RESOURCES.items()}


@dataclass(frozen=True)
class FrontierResult:
    """A traced frontier.

    Args:
        resource: whose budget varies.
        hull: the exact upper concave hull, other budgets left aside.
        certified: allocations at chosen budgets, all other budgets kept, each with its proved bound.
        files: frontier_csv and frontier_svg.
    """

    resource: str
    hull: tuple[FrontierRow, ...]
    certified: tuple[FrontierRow, ...]
    files: dict[str, Path]


def trace_frontier(
    statistics_path: Path,
    config: RunConfig,
    resource: str,
    *,
    base_dir: Path,
    budgets: Sequence[float] = (),
    points: int = 10,
    progress: Progress = silent,
) -> FrontierResult:
    """Trace the frontier of ``resource`` and write ``frontier.csv`` and ``frontier.svg`` to the output directory.

    Args:
        statistics_path: statistics.safetensors of an earlier run.
        config: options, other budgets and utility model; its budget on ``resource`` itself is not used.
        resource: trainable_params, flops, vram_gb or latency_ms.
        base_dir: folder that a relative output directory starts from.
        budgets: where to certify allocations; ``points`` budgets spread evenly on a logarithmic scale when empty.
        points: how many budgets to certify when none are given.
        progress: told of every certified budget.

    Raises:
        ConfigurationError: an unknown resource.
        ActivationCacheError: the statistics cannot be used.
        InfeasibleError: the smallest budget allows nothing.
    """
    _refuse_unknown(resource)
    with published(config.output.directory, base_dir) as place:
        job = job_without_model(config, base_dir, place.directory, progress)
        spec, statistics = load_statistics(statistics_path)
        found = traced(
            spec, statistics, config, resource, budgets=budgets, points=points, threads=job.threads, progress=progress
        )
        with staged_directory(job.output) as staging:
            written = write_frontier(staging, found)
            files = {name: job.output / path.relative_to(staging) for name, path in written.items()}
        return place.publish(FrontierResult(resource, found.hull, found.rows, files))


def traced(
    spec: ModelSpec,
    statistics: ModelStatistics,
    config: RunConfig,
    resource: str,
    *,
    budgets: Sequence[float] = (),
    points: int = 10,
    threads: int = 1,
    progress: Progress = silent,
) -> TracedFrontier:
    """The frontier of ``resource`` from what was measured; arguments and errors as of ``trace_frontier``."""
    _refuse_unknown(resource)
    problem = _problem_with_any_budget(spec, statistics, config, resource)
    curve = frontier(problem, resource, threads=threads)
    chosen_budgets = [float(budget) for budget in budgets] or _spread(curve, points)
    certified = []
    with progress.stage("Certifying budgets", total=len(chosen_budgets)) as advance:
        for budget in chosen_budgets:
            (allocation,) = budget_sweep(
                problem,
                resource,
                [budget],
                refine=config.optimization.refine,
                refine_deterministic_time=config.optimization.refine_deterministic_time,
                time_s=config.optimization.solver_time_s,
                gap_tolerance=config.optimization.gap_tolerance,
                seed=config.runtime.seed,
                threads=threads,
            )
            certified.append(
                FrontierRow(
                    kind="certified",
                    budget=budget,
                    score=allocation.value,
                    upper_bound=allocation.upper_bound,
                    gap=allocation.gap,
                    status=allocation.status,
                )
            )
            advance(1)
    return TracedFrontier(resource, tuple(hull_rows(problem, curve)), tuple(certified))


def _refuse_unknown(resource: str) -> None:
    if resource not in RESOURCES:
        raise ConfigurationError(f"unknown resource {resource!r}; known: {', '.join(RESOURCES)}")


def _problem_with_any_budget(
    spec: ModelSpec, statistics: ModelStatistics, config: RunConfig, resource: str
) -> AllocationProblem:
    """The allocation problem with room for every option in ``resource``."""
    refuse_non_finite(statistics)
    utilities, costs = option_tables(spec, statistics, config)
    everything = costs.base[resource] + float(costs.cost__ro[RESOURCES.index(resource)].sum())
    budget = {BUDGET_FIELDS[resource]: int(np.ceil(everything)) if resource == "trainable_params" else everything}
    optimization: OptimizationConfig = config.optimization.model_copy(update=budget)
    return build_problem(spec, utilities, costs, optimization)


def _spread(curve: Frontier, points: int) -> list[float]:
    """Budgets from the first that adapts anything to the last that buys anything, evenly spread in their logarithm.

    None where no option has a gain: no budget buys anything then.
    """
    if len(curve.budget) == 1:
        return []
    added = np.geomspace(curve.budget[1] - curve.budget[0], curve.budget[-1] - curve.budget[0], points)
    budgets = curve.budget[0] + added
    budgets[0], budgets[-1] = curve.budget[1], curve.budget[-1]  # exactly, whatever geomspace rounds
    return [float(budget) for budget in np.ceil(budgets)] if curve.resource == "trainable_params" else budgets.tolist()


def hull_rows(problem: AllocationProblem, curve: Frontier) -> list[FrontierRow]:
    """The points of a frontier, each with the one choice that changes there."""
    rows = []
    for point, (budget, value) in enumerate(zip(curve.budget.tolist(), curve.value.tolist(), strict=True)):
        switched = None if point == 0 else problem.options[int(curve.option[point])]
        rows.append(
            FrontierRow(
                kind="hull",
                budget=budget,
                score=value,
                upper_bound=value,
                gap=0.0,
                status="optimal",
                layer="" if switched is None else switched.layer,
                method="" if switched is None else switched.method,
                rank=0 if switched is None else switched.rank,
            )
        )
    return rows
