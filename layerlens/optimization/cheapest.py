"""The cheapest choice that is as good as uniform LoRA: the objective and a constraint exchanged.

The gain of a set of options with utilities u is (Σ u)^p, so the share of uniform LoRA's gain that a choice keeps is
(Σ u / Σ u_uniform)^p. It rises with Σ u, so "keeps at least k" is

    Σ u >= k^(1/p) · Σ u_uniform

whatever p: one more row of the same problem, in which an option uses what its utility is short of the best of its
layer. A layer counts for at most what it would with uniform LoRA's own rank: more rank on few layers stands for none of
the others.

What is maximised is minus the cost, with all that is paid once as penalties. So bound, charges, depth and CP-SAT are
those of :mod:`solver`, and its upper bound on minus the cost is a proved least cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from layerlens.config import OptimizationConfig
from layerlens.exceptions import ConfigurationError, InfeasibleError
from layerlens.models import LORA, RESOURCES, Allocation, AllocationProblem, CostTable, ModelSpec, Saving, UtilityTable
from layerlens.optimization.constraints import one_rank_each
from layerlens.optimization.problem import MEMORY, build_problem, exact_sum
from layerlens.optimization.uniform import allocation_of, uniform_choice
from layerlens.vocabulary import RESOURCES as WORDS

SHORTFALL = "improvement_given_up"
"""The row of what a choice gives up, as a share of what uniform LoRA's utilities add up to."""
ROUNDING = 1e-12
"""Of that share, so that uniform LoRA itself is within a margin of 0 whatever order its utilities are added in: sums of
n <= 1e4 terms of at most the whole err by n·2^-53."""
LEAST_SAVING = 0.02
"""Share of the cost below which nothing is saved: predictions of one step tell no less apart."""


@dataclass(frozen=True)
class Reference:
    """Uniform LoRA, which cheaper choices are compared with.

    Args:
        entries: int64, of the tables.
        choice: int64 [groups], the same in the problem of ``config``.
        config: what the problem is built from; with one rank where the engine that serves holds one.
        counted__o: float64, what the utility of each entry counts for.
        use: what it uses of each resource by prediction.
        power: see the module.
    """

    entries: np.ndarray
    choice: np.ndarray
    config: OptimizationConfig
    counted__o: np.ndarray
    use: dict[str, float]
    power: float

    @property
    def utility(self) -> float:
        """What its utilities add up to."""
        return exact_sum(self.counted__o[self.entries])

    def kept(self, entries: np.ndarray) -> float:
        """The share of its gain that a choice keeps."""
        return (max(exact_sum(self.counted__o[entries]), 0.0) / self.utility) ** self.power


def uniform_reference(
    spec: ModelSpec, utilities: UtilityTable, costs: CostTable, config: OptimizationConfig, power: float
) -> Reference:
    """Uniform LoRA within the budgets; where one rank is served, the rank with the largest sum of utilities.

    Raises:
        ConfigurationError: what is to be least is not predicted, or nothing was measured that a choice could keep.
        InfeasibleError: no uniform LoRA fits the budgets.
    """
    for name in config.minimised():
        if name not in costs.source:
            raise ConfigurationError(
                f"optimization.minimise: the {WORDS[name].label} of this model is not predicted, because no training "
                "step was recorded. `layerlens run` records one if the model is in memory, and otherwise says why. "
                "Minimise vram_gb, or set objective: score"
            )
    found: list[Reference] = []
    refused: ConfigurationError | None = None
    for each in one_rank_each(config):
        try:
            problem = build_problem(spec, utilities, costs, each)
        except ConfigurationError as error:  # with this rank alone
            refused = refused or error
            continue
        choice = uniform_choice(problem, np.asarray(problem.offset[:-1]))
        if choice is not None:
            entries = problem.entries(choice)
            counted__o = _counted(utilities, entries)
            found.append(Reference(entries, choice, each, counted__o, costs.total(entries), power))
    if not found:
        if refused is not None:
            raise refused
        raise InfeasibleError(
            "optimization.objective: cheapest compares choices with uniform LoRA, and no uniform LoRA fits the "
            "budgets; raise them, or set objective: score"
        )
    best = max(found, key=lambda one: exact_sum(utilities.utility[one.entries]))
    if not best.utility > 0.0:
        raise ConfigurationError(
            f"optimization.objective: cheapest keeps a share of uniform LoRA's predicted improvement, and by the "
            f"utility model {utilities.model!r} that is 0; raise data.calibration_samples, or set objective: score"
        )
    return best


def _counted(utilities: UtilityTable, uniform: np.ndarray) -> np.ndarray:
    """Utilities, each at most that of LoRA of uniform LoRA's largest rank on its layer; without LoRA as they are."""
    options, most = utilities.options, max(utilities.options[int(entry)].rank for entry in uniform)
    cap: dict[str, float] = {}
    for option, utility in zip(options, utilities.utility.tolist(), strict=True):
        if option.method == LORA and option.rank <= most:
            cap[option.layer] = max(cap.get(option.layer, 0.0), utility)
    limit = np.array([cap.get(option.layer, np.inf) for option in options])
    return np.minimum(utilities.utility, limit)


def cheapest_problem(
    spec: ModelSpec,
    utilities: UtilityTable,
    costs: CostTable,
    config: OptimizationConfig,
    reference: Reference,
    kept: float | None = None,
    limits: Sequence[tuple[str, np.ndarray, float]] = (),
) -> AllocationProblem:
    """The problem whose best value is minus the least cost; see the module.

    Args:
        spec, utilities, costs, config: as of ``build_problem``.
        reference: uniform LoRA; costs count as shares of what it uses.
        kept: the share of its gain that is to be kept at least; 1 - ``quality_margin`` when None.
        limits: further resources, as of ``build_problem``.
    """
    kept = 1.0 - config.quality_margin if kept is None else kept
    names = [option.layer for option in utilities.options]
    first = np.array([0, *(i for i in range(1, len(names)) if names[i] != names[i - 1])], dtype=np.int64)
    counted = reference.counted__o
    top = np.maximum.reduceat(counted, first)
    short = (np.repeat(top, np.diff(np.append(first, len(names)))) - counted) / reference.utility
    room = exact_sum(top) / reference.utility - kept ** (1.0 / reference.power)
    # Of lower bounds, which have memory at several moments, that of the last moment counts.
    row_of = {name: row for row, name in enumerate(RESOURCES)}
    if costs.moments:
        row_of[MEMORY] = len(RESOURCES) + len(costs.moments) - 1
    weighed = {
        row_of[name]: (weight, reference.use[name])
        for name, weight in config.minimised().items()
        if reference.use[name] > 0.0
    }
    by_cost = config.model_copy(update={"objective_weights": {"utility": 0.0}})
    limit = (SHORTFALL, short, room + ROUNDING * max(room, 1.0))
    return build_problem(spec, utilities, costs, by_cost, weighed=weighed, limits=[limit, *limits])


def cost_share(config: OptimizationConfig, reference: Reference, use: dict[str, float]) -> float:
    """What a use of the resources costs as a share of uniform LoRA's."""
    return math.fsum(
        weight * (use[name] / reference.use[name] if reference.use[name] > 0.0 else 1.0)
        for name, weight in config.minimised().items()
    )


def saving_of(
    allocation: Allocation,
    problem: AllocationProblem,
    costs: CostTable,
    config: OptimizationConfig,
    reference: Reference,
    kept: float | None = None,
) -> Saving:
    """What an allocation of ``cheapest_problem`` saves against uniform LoRA.

    The solver counts sums, and the cost is what is predicted of the allocation. The room between value and bound is the
    same for both, as ``find_allocation`` has it.
    """
    entries = problem.entries(allocation.choice)
    use = costs.total(entries)
    share = cost_share(config, reference, use)
    least = share - max(0.0, allocation.upper_bound - allocation.value)
    wanted = 1.0 - config.quality_margin if kept is None else kept
    keeps = reference.kept(entries)
    saves = not np.array_equal(entries, reference.entries) and share <= 1.0 - LEAST_SAVING
    words = " and ".join(WORDS[name].label for name in config.minimised())
    reason = ""
    if not saves:
        reason = (
            f"the cheapest choice found that keeps {wanted:.1%} of uniform LoRA's predicted improvement needs "
            f"{share:.1%} of its {words}, and no choice is proved to need less than {least:.1%}; less than "
            f"{LEAST_SAVING:.0%} is below the accuracy of the predictions"
        )
    return Saving(
        minimised=config.minimised(),
        asked_share=wanted,
        kept_share=keeps,
        cost_share=share,
        least_cost_share=least,
        saves=saves,
        reason=reason,
        law=reference.power,
        price=dict(zip(problem.resources, allocation.multipliers.tolist(), strict=True))[SHORTFALL],
        uniform_lora=uniform_facts(costs, reference),
        written="cheapest" if saves else "uniform-lora",
    )


def uniform_facts(costs: CostTable, reference: Reference) -> dict[str, float]:
    """What uniform LoRA uses of each resource that is predicted."""
    return {name: float(amount) for name, amount in reference.use.items() if name in costs.source}


def as_uniform(
    spec: ModelSpec,
    utilities: UtilityTable,
    costs: CostTable,
    reference: Reference,
    optimum: Allocation,
) -> tuple[AllocationProblem, Allocation]:
    """Uniform LoRA as an answer of the same problem, with the optimum's bound."""
    problem = cheapest_problem(spec, utilities, costs, reference.config, reference)
    return problem, allocation_of(problem, reference.choice, optimum)
