"""From statistics to a manifest: utilities and costs, the allocation problem, its certified answer."""

from __future__ import annotations

import platform
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from typing import Any

import numpy as np

from layerlens import __version__
from layerlens.config import OptimizationConfig, RunConfig
from layerlens.config.optimization import CHEAPEST
from layerlens.config.training import REPORTS
from layerlens.cost import cost_table
from layerlens.exceptions import ConfigurationError
from layerlens.jobs.predicted import predicted_gain
from layerlens.jobs.worth import beside_rank_32, beside_uniform, lora_everywhere
from layerlens.methods import enumerate_options
from layerlens.models import (
    LORA,
    NONE,
    RESOURCES,
    Allocation,
    AllocationProblem,
    CostTable,
    FrozenStage,
    LayerExplanation,
    LoraSettings,
    Manifest,
    ManifestRow,
    ModelFacts,
    ModelSpec,
    ModelStatistics,
    Option,
    Provenance,
    ResourceUse,
    Saving,
    SolverEvent,
    UtilityTable,
)
from layerlens.optimization import (
    frozen_stages,
)
from layerlens.optimization.cheapest import SHORTFALL
from layerlens.registry import METHODS
from layerlens.utility import calibrated_table, model_for

RECORDED_PACKAGES = ("numpy", "torch", "transformers", "peft", "ortools")
NOT_RECORDED: Any = {
    **dict.fromkeys(("output", "study", "distributed", "telemetry", "tracking"), True),
    "runtime": {"cache_dir", "threads", "saving_time_share"},
    "training": REPORTS,
}
"""Settings that change no number."""

AUTO, OF_SETS = "auto", "energy"
"""What ``auto`` means where the least cost is sought: a utility of whole sets of layers."""
DIGITS = 5
"""The ghost norms of two instruction sets differ by up to 2.4e-7 of their value, and means over samples by less."""


@dataclass(frozen=True)
class Solution:
    """An allocation, everything it was made from, why each layer got its option, and how the solver got there.

    ``saving`` is there where the least cost was sought: what it saves against uniform LoRA.
    """

    utilities: UtilityTable
    costs: CostTable
    problem: AllocationProblem
    allocation: Allocation
    explanations: tuple[LayerExplanation, ...]
    events: tuple[SolverEvent, ...]
    saving: Saving | None = None

    @cached_property
    def frozen(self) -> tuple[FrozenStage, ...]:
        """What going deeper than the lowest adapted layer would cost and gain; none where no budget limits depth."""
        return tuple(frozen_stages(self.problem, self.allocation))


def option_tables(
    spec: ModelSpec,
    statistics: ModelStatistics,
    config: RunConfig,
    utility_model: str | None = None,
    checkpointed: Collection[str] | None = None,
) -> tuple[UtilityTable, CostTable]:
    """Utility and costs of every option on offer.

    Args:
        spec, statistics: of the model.
        config: what is offered, and what the costs are for.
        utility_model: another one than the configuration's.
        checkpointed: blocks whose activations are computed again; None: all or none, as the configuration says.

    Raises:
        ConfigurationError: the utility model needs what was not measured, or a method was not measured.
    """
    measured = {method for layer in spec.layers for method in layer.methods}
    for name in config.optimization.methods:
        if METHODS[name].on_request and name not in measured:
            raise ConfigurationError(
                f"optimization.methods: no layer has statistics for {name}; run `layerlens run` with it (if the model "
                "has layers for it), or leave it out"
            )
    options = enumerate_options(spec, config.optimization.ranks())
    name = utility_model or config.profiling.utility_model
    if name == AUTO and config.optimization.objective == CHEAPEST:
        name = OF_SETS
    model = model_for(name, spec, config.optimization.max_trainable_params)

    def table_of(options: Sequence[Option]) -> UtilityTable:
        weights = config.profiling.metric_weights
        return _without_noise(
            calibrated_table(model, spec, statistics, options, weights, seed=config.runtime.seed), statistics
        )

    utilities = table_of(options)
    if LORA in config.optimization.methods and config.optimization.objective != CHEAPEST:
        utilities = replace(utilities, everywhere=lora_everywhere(spec, utilities, table_of))
    return utilities, costs_of(spec, statistics, options, config, checkpointed)


def costs_of(
    spec: ModelSpec,
    statistics: ModelStatistics,
    options: Sequence[Option],
    config: RunConfig,
    checkpointed: Collection[str] | None = None,
) -> CostTable:
    """Costs of the options with these blocks checkpointed; None: all or none, as the configuration says."""
    if checkpointed is None:
        every = config.training.gradient_checkpointing is True and statistics.step is not None
        checkpointed = statistics.step.blocks if every and statistics.step is not None else ()
    accumulates = config.training.gradient_accumulation > 1
    return cost_table(
        spec, statistics, options, config.optimization, accumulates=accumulates, checkpointed=checkpointed
    )


def _without_noise(utilities: UtilityTable, statistics: ModelStatistics) -> UtilityTable:
    """Utilities from per-sample norms with as many digits as do not depend on the instruction set that summed them.

    All figures of a manifest follow from these. Other statistics are the same bits for every instruction set.
    """
    if not any(one.trace is not None for layer in statistics.layers for one in layer.by_method.values()):
        return utilities
    calibration = utilities.calibration
    if calibration is not None:
        calibration = replace(calibration, replicates__bo=_with_digits(calibration.replicates__bo))
    return replace(utilities, utility=_with_digits(utilities.utility), calibration=calibration)


def _with_digits(values: np.ndarray) -> np.ndarray:
    """Values with ``DIGITS`` significant decimal digits; what is too small for that, as it is."""
    size = np.abs(values)
    power = 10.0 ** (DIGITS - 1 - np.floor(np.log10(np.clip(size, 1e-250, 1e250))))
    rounded: np.ndarray = np.where((size > 1e-250) & (size < 1e250), np.rint(values * power) / power, values)
    return rounded


def make_manifest(
    spec: ModelSpec,
    solution: Solution,
    config: OptimizationConfig,
    *,
    model: ModelFacts,
    provenance: Provenance,
) -> Manifest:
    """The manifest of a solution."""
    utilities, costs, problem, allocation = (
        solution.utilities,
        solution.costs,
        solution.problem,
        solution.allocation,
    )
    entry_value = problem.value if problem.entry_value is None else problem.entry_value
    rows = []
    for entry in (int(index) for index in problem.entries(allocation.choice)):
        params, flops, vram, latency = (float(cost) for cost in costs.cost__ro[:4, entry])
        rows.append(
            ManifestRow(
                layer=utilities.options[entry].layer,
                method=utilities.options[entry].method,
                rank=utilities.options[entry].rank,
                utility=float(utilities.utility[entry]),
                cost=round(params),
                flops=flops,
                vram=vram,
                latency=latency,
                total_score=float(entry_value[entry]),
            )
        )
    once = float(np.sum(problem.value_terms(allocation.choice)[len(allocation.choice) :]))
    lowest = next((place for place, row in enumerate(rows) if row.method != NONE), None)
    if once and lowest is not None:  # what is paid once comes off the score of the first layer that is adapted
        rows[lowest] = replace(rows[lowest], total_score=rows[lowest].total_score + once)
    return Manifest(
        model=replace(
            model, name_or_path=spec.model_name, fingerprint=spec.fingerprint, total_params=spec.total_params
        ),
        allocations=tuple(rows),
        resources=_resource_uses(solution, config),
        score=allocation.value,
        upper_bound=allocation.upper_bound,
        gap=allocation.gap,
        status=allocation.status,
        solver=allocation.solver,
        utility_model=utilities.model,
        utility_unit=utilities.unit,
        lora=LoraSettings(config.alpha_over_r, config.use_rslora, config.lora_initialization),
        predicted=replace(
            predicted_gain(utilities, problem.entries(allocation.choice)),
            uniform_lora=beside_uniform(costs, problem.entries(allocation.choice)),
            cheapest=solution.saving,
            rank_32=beside_rank_32(utilities, problem.entries(allocation.choice)),
        ),
        provenance=provenance,
        checkpointed=costs.checkpointed,
    )


def _resource_uses(solution: Solution, config: OptimizationConfig) -> tuple[ResourceUse, ...]:
    """Use of every resource, of those without a budget too."""
    costs, problem, allocation = solution.costs, solution.problem, solution.allocation
    price = dict(zip(problem.resources, (float(value) for value in allocation.multipliers), strict=True))
    entries = problem.entries(allocation.choice)
    uses, totals, frozen = [], costs.total(entries), costs.frozen
    for resource in RESOURCES:
        if resource not in costs.source:  # not predicted for this model
            continue
        base, total = frozen[resource], totals[resource]
        budget = config.budgets()[resource]
        uses.append(
            ResourceUse(
                resource=resource,
                budget=None if budget is None else float(budget),
                base=base,
                added=total - base,
                total=total,
                multiplier=price.get(resource, 0.0),
                source=costs.source[resource],
            )
        )
    for row, resource in enumerate(problem.resources):
        if resource not in RESOURCES and resource != SHORTFALL:
            used = float(allocation.used[row])
            uses.append(
                ResourceUse(
                    resource=resource,
                    budget=float(problem.budget[row]),
                    base=0.0,
                    added=used,
                    total=used,
                    multiplier=price[resource],
                    source="configuration",
                )
            )
    return tuple(uses)


def recorded_config(config: RunConfig) -> dict[str, Any]:
    """What a manifest records of the configuration that it was made by."""
    return config.model_dump(mode="json", exclude=NOT_RECORDED)


def run_provenance(config: RunConfig, threads: int, statistics: dict[str, Any]) -> Provenance:
    """What a run was made from: nothing that differs between two runs of one configuration on one machine."""
    return Provenance(
        seed=config.runtime.seed,
        config=recorded_config(config),
        threads=threads,
        statistics=statistics,
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Versions of LayerLens, Python and the packages that the numbers depend on."""
    found = {"layerlens": __version__, "python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
