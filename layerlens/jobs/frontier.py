"""The budget-to-value curve of one resource from saved statistics: how much another thousand parameters would buy."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from layerlens import vocabulary
from layerlens.config import OptimizationConfig, RunConfig
from layerlens.config.optimization import SCORE
from layerlens.exceptions import ConfigurationError, InfeasibleError
from layerlens.jobs.certified import ON_THE_STEP
from layerlens.jobs.checkpointed import certified_choice
from layerlens.jobs.envelope import envelope
from layerlens.jobs.find import best_of
from layerlens.jobs.job import job_without_model
from layerlens.jobs.result import published
from layerlens.jobs.solve import Solution, option_tables
from layerlens.jobs.worth import lora_of_rank
from layerlens.manifest import write_frontier
from layerlens.manifest.frontier import TracedFrontier
from layerlens.models import (
    LORA,
    RESOURCES,
    Allocation,
    AllocationProblem,
    CostTable,
    FrontierRow,
    ModelSpec,
    ModelStatistics,
    UtilityTable,
)
from layerlens.optimization import Frontier, budget_sweep, build_problem, frontier
from layerlens.optimization.constraints import one_rank_each
from layerlens.optimization.problem import exact_sum
from layerlens.profiling.finite import refuse_non_finite
from layerlens.profiling.statistics_file import load_statistics
from layerlens.utils.atomic import staged_directory
from layerlens.utils.progress import Progress, silent

USUAL_RANK = 8
BUDGET_FIELDS = {name: resource.budget for name, resource in vocabulary.RESOURCES.items()}


@dataclass(frozen=True)
class FrontierResult:
    """A traced frontier.

    Args:
        resource: whose budget varies.
        hull: the exact upper concave hull, other budgets left aside; of memory and step time, which choices pay for
            once, a curve that no choice exceeds.
        certified: allocations at chosen budgets, all other budgets kept, each with its proved bound.
        files: frontier_csv and frontier_svg.
        marked: what everybody would choose, for comparison.
    """

    resource: str
    hull: tuple[FrontierRow, ...]
    certified: tuple[FrontierRow, ...]
    files: dict[str, Path]
    marked: tuple[FrontierRow, ...] = ()


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
        progress: called after every certified budget.

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
        return place.publish(FrontierResult(resource, found.hull, found.rows, files, found.marked))


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
    """The frontier of ``resource`` from what was measured; arguments and errors as of ``trace_frontier``.

    It is of the score, whatever the objective of ``config`` is.
    """
    _refuse_unknown(resource)
    config = config.by_score()
    utilities, costs, problems = _problems_with_any_budget(spec, statistics, config, resource)
    shared = is_shared(problems[0], resource)
    if shared:
        hull = envelope_of_all(spec, utilities, costs, config.optimization, resource, threads)
    else:
        hull = _hull_of_all([hull_rows(problem, frontier(problem, resource, threads=threads)) for problem in problems])
    chosen_budgets = [float(budget) for budget in budgets] or (
        _spread_shared(problems[0], costs, resource, points) if shared else _spread(hull, resource, points)
    )
    certified = []
    with progress.stage("Certifying budgets", total=len(chosen_budgets)) as advance:
        for budget in chosen_budgets:
            if resource in ON_THE_STEP and costs.step is not None:  # a run holds its answer against its prediction
                within = _with_budget(config, resource, budget)
                allocation = certified_choice(spec, statistics, utilities, costs, within, threads).allocation
            else:
                allocation = _certified(problems, resource, budget, config, threads)
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
    return TracedFrontier(
        resource, tuple(hull), tuple(certified), marked=marked_rows(spec, costs, problems[0], resource)
    )


def _with_budget(config: RunConfig, resource: str, budget: float) -> RunConfig:
    """The configuration that seeks the best score within this budget and its others."""
    changed = {BUDGET_FIELDS[resource]: budget, "objective": SCORE}
    return config.model_copy(update={"optimization": config.optimization.model_copy(update=changed)})


def _certified(
    problems: Sequence[AllocationProblem], resource: str, budget: float, config: RunConfig, threads: int
) -> Allocation:
    """The best allocation within one budget; of several problems those count that have one."""
    optimization, found = config.optimization, []
    refused: InfeasibleError | None = None
    for problem in problems:
        try:
            found += budget_sweep(
                problem,
                resource,
                [budget],
                refine=optimization.refine,
                refine_deterministic_time=optimization.refine_deterministic_time,
                time_s=optimization.solver_time_s,
                gap_tolerance=optimization.gap_tolerance,
                seed=config.runtime.seed,
                threads=threads,
            )
        except InfeasibleError as error:
            refused = refused or error
    if refused is not None and not found:
        raise refused
    return best_of(found, optimization.gap_tolerance)


def _hull_of_all(hulls: Sequence[list[FrontierRow]]) -> list[FrontierRow]:
    """The upper concave hull of several: one for each rank, where the engine that serves holds one rank for all layers.

    Where the next point has another rank than the one before it, no single layer changes, and its row names none.
    """
    if len(hulls) == 1:
        return hulls[0]
    before = {id(row): rows[place - 1] for rows in hulls for place, row in enumerate(rows) if place}
    of_rank = {id(row): rows[-1] for rows in hulls for row in rows}
    kept: list[FrontierRow] = []
    for row in sorted((row for rows in hulls for row in rows), key=lambda row: (row.budget, -row.score)):
        if kept and row.score <= kept[-1].score:
            continue
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) <= _slope(kept[-1], row):
            kept.pop()
        kept.append(row)
    found = kept[:1]
    for earlier, row in pairwise(kept):
        same = before.get(id(row)) is earlier
        last = of_rank[id(row)]
        found.append(row if same else replace(row, layer="", method=last.method, rank=last.rank))
    return found


def _slope(one: FrontierRow, other: FrontierRow) -> float:
    """What more of the budget buys between two points; without bound where it costs nothing."""
    step = other.budget - one.budget
    return (other.score - one.score) / step if step > 0.0 else float("inf")


def _refuse_unknown(resource: str) -> None:
    if resource not in RESOURCES:
        raise ConfigurationError(f"unknown resource {resource!r}; known: {', '.join(RESOURCES)}")


def _problems_with_any_budget(
    spec: ModelSpec, statistics: ModelStatistics, config: RunConfig, resource: str
) -> tuple[UtilityTable, CostTable, list[AllocationProblem]]:
    """The allocation problem with room for every option in ``resource``; one for each rank where one is served;
    after the utilities and the costs that they are made of.

    Raises:
        ConfigurationError: the rules leave a layer without any option, whatever the rank.
    """
    refuse_non_finite(statistics)
    utilities, costs = option_tables(spec, statistics, config)
    row = RESOURCES.index(resource)
    everything = costs.base[resource] + float(costs.cost__ro[row].sum() + sum(x.cost__r[row] for x in costs.charges))
    everything += 0.0 if costs.depth is None else float(costs.depth.cost__sr[0, row])
    budget = {BUDGET_FIELDS[resource]: int(np.ceil(everything)) if resource == "trainable_params" else everything}
    optimization: OptimizationConfig = config.optimization.model_copy(update=budget)
    problems: list[AllocationProblem] = []
    refused: ConfigurationError | None = None
    for each in one_rank_each(optimization):
        try:
            problems.append(build_problem(spec, utilities, costs, each))
        except ConfigurationError as error:  # with this rank alone
            refused = refused or error
    if refused is not None and not problems:
        raise refused
    return utilities, costs, problems


def hulls_around(spec: ModelSpec, config: OptimizationConfig, solution: Solution) -> dict[str, list[FrontierRow]]:
    """The hull of every resource with a budget; none where the least cost was sought."""
    if solution.saving is not None:
        return {}
    problem, found = solution.problem, {}
    for resource in problem.resources:
        if is_shared(problem, resource):
            found[resource] = envelope_of_all(spec, solution.utilities, solution.costs, config, resource)
        else:
            found[resource] = hull_rows(problem, frontier(problem, resource))
    return found


def is_shared(problem: AllocationProblem, resource: str) -> bool:
    """Whether choices pay for some of the resource once: its hull is then that of lower bounds (``envelope``)."""
    row = problem.resources.index(resource)
    if any(charge.cost__r[row] for charge in problem.charges):
        return True
    return problem.depth is not None and bool(problem.depth.cost__sr[:, row].any())


def envelope_of_all(
    spec: ModelSpec,
    utilities: UtilityTable,
    costs: CostTable,
    config: OptimizationConfig,
    resource: str,
    threads: int = 1,
) -> list[FrontierRow]:
    """``envelope``, of all ranks where one is served; [] where no step of the model is recorded, or nothing has a gain.

    Raises:
        ConfigurationError: the rules leave a layer without any option, whatever the rank.
    """
    if costs.step is None or not (utilities.utility > 0.0).any():
        return []
    unlimited = config.model_copy(update={BUDGET_FIELDS[resource]: sys.float_info.max / 2})
    found: list[list[FrontierRow]] = []
    refused: ConfigurationError | None = None
    for each in one_rank_each(unlimited):
        try:
            found.append(envelope(spec, utilities, costs, each, resource, threads))
        except ConfigurationError as error:  # with this rank alone
            refused = refused or error
    if not found:
        assert refused is not None
        raise refused
    return _hull_of_all(found)


def marked_rows(
    spec: ModelSpec, costs: CostTable, problem: AllocationProblem, resource: str
) -> tuple[FrontierRow, ...]:
    """What everybody would choose: LoRA of one rank on all layers, on query and value, and of the largest on all."""
    assert problem.entry_value is not None
    ranks = sorted({option.rank for option in costs.options if option.method == LORA})
    if not ranks:
        return ()
    q_and_v = frozenset(layer.name for layer in spec.layers if layer.role in ("query", "value"))
    rank = min(ranks, key=lambda one: abs(one - USUAL_RANK))
    found = {
        f"uniform LoRA {rank}": lora_of_rank(costs, rank),
        f"LoRA {rank} on query and value": lora_of_rank(costs, rank, q_and_v),
        f"LoRA {ranks[-1]} on all layers": lora_of_rank(costs, ranks[-1]),
    }
    rows = []
    for name, entries in found.items():
        if len(entries):
            score = exact_sum(problem.entry_value[entries])
            rows.append(
                FrontierRow("marked", costs.total(entries)[resource], score, score, 0.0, "not solved for", layer=name)
            )
    return tuple(rows)


def _spread_shared(problem: AllocationProblem, costs: CostTable, resource: str, points: int) -> list[float]:
    """Budgets as the solver counts them, from the cheapest option with a gain to the best of every layer."""
    assert problem.entry_value is not None
    gaining = [int(entry) for entry in np.flatnonzero(problem.entry_value > 0.0)]
    if not gaining:
        return []
    low = min(costs.bound(np.array([entry]))[resource] for entry in gaining)
    best: dict[str, int] = {}
    for entry in gaining:
        layer = costs.options[entry].layer
        if layer not in best or problem.entry_value[entry] > problem.entry_value[best[layer]]:
            best[layer] = entry
    high = costs.bound(np.array(sorted(best.values())))[resource]
    slack = 1e-9 * high  # the budget less the base is rounded
    return [float(budget) + slack for budget in np.linspace(low, high, points)]


def _spread(hull: Sequence[FrontierRow], resource: str, points: int) -> list[float]:
    """Budgets from the first that adapts anything to the last that buys anything, evenly spread in their logarithm.

    None where no option has a gain: no budget buys anything then.
    """
    if len(hull) == 1:
        return []
    base, first, last = (hull[place].budget for place in (0, 1, -1))
    budgets = base + np.geomspace(first - base, last - base, points)
    budgets[0], budgets[-1] = first, last  # exactly, whatever geomspace rounds
    return [float(budget) for budget in np.ceil(budgets)] if resource == "trainable_params" else budgets.tolist()


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
