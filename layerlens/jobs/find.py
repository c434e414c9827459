"""The certified answer: the problem as the solver counts it, compared with the prediction for its answer, and proved.

The solver adds up upper bounds of memory and time (``CostTable.bound``). They hold for the many choices that they were
taken from. Should the answer need more than its bound says, and than the budget has, the base is raised and the problem
solved again. Where it needs less, the base is lowered to what is predicted of it, as long as that finds a better answer
within the budgets. What is proved of the answer is proved with lower bounds (:mod:`layerlens.jobs.certified`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from layerlens import vocabulary
from layerlens.config import OptimizationConfig
from layerlens.config.optimization import CHEAPEST
from layerlens.exceptions import ConfigurationError, InfeasibleError, LayerLensError
from layerlens.jobs.certified import ON_THE_STEP, Aim, prove, single_option
from layerlens.jobs.solve import Solution
from layerlens.models import (
    Allocation,
    AllocationProblem,
    CostTable,
    ModelSpec,
    SolverEvent,
    UtilityTable,
)
from layerlens.optimization import (
    as_uniform,
    build_problem,
    cheapest_problem,
    explain,
    saving_of,
    solve,
    uniform_reference,
)
from layerlens.optimization.cheapest import Reference
from layerlens.optimization.constraints import one_rank_each
from layerlens.optimization.problem import exact_sum
from layerlens.registry import UTILITY_MODELS

MOST_LOWERED = 4
"""Times that the problem is solved again because the answer needs less than it was counted for."""


def find_allocation(
    spec: ModelSpec,
    utilities: UtilityTable,
    costs: CostTable,
    config: OptimizationConfig,
    *,
    seed: int,
    threads: int,
    progress: Callable[[str], None] | None = None,
    kept: float | None = None,
) -> Solution:
    """Build the allocation problem and solve it.

    With ``objective: cheapest`` the least cost is sought that keeps the share ``kept`` of uniform LoRA's predicted
    improvement (1 - ``quality_margin`` when None); where that saves nothing, the answer is uniform LoRA.

    Raises:
        InfeasibleError: the budgets allow nothing; the message has the smallest that would do.
    """
    _refuse_what_is_not_predicted(costs, config)
    narrowed = _with_what_a_step_needs(costs, config)
    reference = None
    if narrowed.objective == CHEAPEST:
        power = UTILITY_MODELS[utilities.model].set_power
        reference = uniform_reference(spec, utilities, costs, narrowed, power)
    aim = Aim(spec, utilities, costs, config, reference, kept)
    search = _Search(aim, narrowed, seed, threads, progress)
    found = search.first()
    for _ in range(MOST_LOWERED):
        lower = _as_counted(found, config)
        if lower is None:
            break
        other = search.within_budgets(lower)
        if other.allocation.value <= found.allocation.value:
            break
        found = other
    if search.is_predicted:
        found = search.proved(found)
    return found if reference is None else _cheapest(spec, found, narrowed, reference, kept)


@dataclass(frozen=True)
class _Search:
    """Answers of one problem with costs as they are counted.

    Args:
        aim: the problem, and what is predicted of a choice.
        config: with a budget of parameters that leaves room for what every step needs.
        seed, threads, progress: of the solver.
    """

    aim: Aim
    config: OptimizationConfig
    seed: int
    threads: int
    progress: Callable[[str], None] | None

    @property
    def is_predicted(self) -> bool:
        """Whether a budget or the objective is about memory or time of a step, and a given choice's are predicted."""
        config = self.aim.config
        minimised = config.minimised() if config.objective == CHEAPEST else {}
        asked = any(config.budgets()[name] is not None or name in minimised for name in ON_THE_STEP)
        return asked and self.aim.costs.step is not None

    def first(self) -> Solution:
        """The answer as the costs are counted at first.

        Raises:
            InfeasibleError: the budgets allow nothing.
        """
        try:
            return self.within_budgets(self.aim.costs)
        except InfeasibleError:
            # What is counted may be too much of every choice; what keeps the budgets as predicted is an answer.
            if not self.is_predicted:
                raise
            _, better = prove(self.aim, None, -np.inf, seed=self.seed, threads=self.threads)
            better = single_option(self.aim) if better is None else better
            if better is None:
                raise
            return self.with_choice(better)

    def within_budgets(self, costs: CostTable) -> Solution:
        """An answer that needs no more than the budgets by its own prediction, with as high a base as that takes."""
        config = self.aim.config
        while True:
            found = self._solved(costs)
            entries = found.problem.entries(found.allocation.choice)
            total, bound = costs.total(entries), costs.bound(entries)
            budgets = {name: budget for name, budget in config.budgets().items() if budget is not None}
            over = [name for name, budget in budgets.items() if total[name] > max(budget, bound[name])]
            if not over:
                return found
            # at least a thousandth more, so that this ends
            more = {name: costs.base[name] + max(total[name] - bound[name], 1e-3 * total[name]) for name in over}
            costs = replace(costs, base=costs.base | more)

    def proved(self, found: Solution) -> Solution:
        """The answer, or a better one that the proof finds, with a bound on every choice that keeps the budgets."""
        entries = found.problem.entries(found.allocation.choice)
        value = self.aim.value(entries)
        bound, better = prove(self.aim, entries, value, seed=self.seed, threads=self.threads)
        if better is not None:
            found, value = self.with_choice(better), self.aim.value(better)
        # The certificate counts from the answer's own value, whatever its sums say of it.
        proved = replace(found.allocation, upper_bound=found.allocation.value + max(0.0, bound - value))
        status = "optimal" if proved.gap <= self.aim.config.gap_tolerance else "feasible"
        return replace(found, allocation=replace(proved, status=status))

    def with_choice(self, entries: np.ndarray) -> Solution:
        """These entries as the answer, counted as they are predicted; prices are those of the solver's answer there."""
        costs = _counted_as(self.aim.costs, self.aim.config, entries)
        prices: dict[str, float] = {}
        with suppress(InfeasibleError):  # the sum of what is counted is rounded
            near = self._solved(costs)
            prices = dict(zip(near.problem.resources, near.allocation.multipliers.tolist(), strict=True))
        chosen = set(entries.tolist())
        for each in one_rank_each(self.aim.config):
            with suppress(ConfigurationError):  # with this rank alone
                problem = self._problem_of(costs, each)
                choice = problem.choice_of(chosen)
                if choice is not None:
                    break
        assert choice is not None  # it was found in the same problem with other costs
        allocation = Allocation(
            choice=choice,
            value=exact_sum(problem.value_terms(choice)),
            upper_bound=np.inf,
            used=np.array([exact_sum(row) for row in problem.terms__rk(choice)]),
            multipliers=np.array([prices.get(name, 0.0) for name in problem.resources]),
            status="feasible",
            solver="lower bounds of the step",
        )
        return Solution(self.aim.utilities, costs, problem, allocation, tuple(explain(problem, allocation)), ())

    def _problem_of(self, costs: CostTable, config: OptimizationConfig) -> AllocationProblem:
        aim = self.aim
        if aim.reference is None:
            return build_problem(aim.spec, aim.utilities, costs, config)
        return cheapest_problem(aim.spec, aim.utilities, costs, config, aim.reference, aim.kept)

    def _solved(self, costs: CostTable) -> Solution:
        config = self.config
        events: list[SolverEvent] = []
        solved: list[tuple[AllocationProblem, Allocation]] = []
        refused: LayerLensError | None = None
        for each in one_rank_each(config):
            try:
                problem = self._problem_of(costs, each)
                allocation = solve(
                    problem,
                    refine=config.refine,
                    refine_deterministic_time=config.refine_deterministic_time,
                    time_s=config.solver_time_s,
                    gap_tolerance=config.gap_tolerance,
                    seed=self.seed,
                    threads=self.threads,
                    progress=self.progress,
                    log=events.append,
                )
            except (InfeasibleError, ConfigurationError) as error:  # with this rank alone
                refused = refused or error
            else:
                solved.append((problem, allocation))
        if not solved:
            assert refused is not None
            raise refused
        allocation = best_of([each for _, each in solved], config.gap_tolerance)
        problem = max(solved, key=lambda pair: pair[1].value)[0]
        return Solution(
            self.aim.utilities, costs, problem, allocation, tuple(explain(problem, allocation)), tuple(events)
        )


def _cheapest(
    spec: ModelSpec, found: Solution, config: OptimizationConfig, reference: Reference, kept: float | None
) -> Solution:
    """The cheapest choice with what it saves, or uniform LoRA if there is none."""
    saving = saving_of(found.allocation, found.problem, found.costs, config, reference, kept)
    if found.utilities.calibration is None:  # the study was about what statistics say alone
        interval = UTILITY_MODELS[found.utilities.model].kept_interval(saving.kept_share)
        saving = replace(saving, kept_interval=interval)
    if saving.saves:
        return replace(found, saving=saving)
    problem, uniform = as_uniform(spec, found.utilities, found.costs, reference, found.allocation)
    return replace(
        found, problem=problem, allocation=uniform, explanations=tuple(explain(problem, uniform)), saving=saving
    )


def _as_counted(found: Solution, config: OptimizationConfig) -> CostTable | None:
    """Costs whose bounds say of the answer what is predicted of it; None where they do, but for a thousandth."""
    entries = found.problem.entries(found.allocation.choice)
    total, bound = found.costs.total(entries), found.costs.bound(entries)
    lower = {
        name: max(0.0, found.costs.base[name] - (bound[name] - total[name]))
        for name, budget in config.budgets().items()
        if budget is not None and bound[name] - total[name] > 1e-3 * budget
    }
    return replace(found.costs, base=found.costs.base | lower) if lower else None


def _counted_as(costs: CostTable, config: OptimizationConfig, entries: np.ndarray) -> CostTable:
    """Costs whose bounds say of these entries what is predicted of them."""
    total, bound = costs.total(entries), costs.bound(entries)
    base = {
        name: max(0.0, costs.base[name] - (bound[name] - total[name]))
        for name in ON_THE_STEP
        if config.budgets()[name] is not None
    }
    return replace(costs, base=costs.base | base)


def best_of(found: Sequence[Allocation], gap_tolerance: float) -> Allocation:
    """The best answer to several problems, such as one for each rank, with the bound that holds for all of them."""
    best = max(found, key=lambda each: each.value)
    if len(found) == 1:
        return best
    best = replace(best, upper_bound=max(each.upper_bound for each in found))
    return replace(best, status="optimal" if best.gap <= gap_tolerance else "feasible")


def _refuse_what_is_not_predicted(costs: CostTable, config: OptimizationConfig) -> None:
    for resource, budget in config.budgets().items():
        if budget is not None and resource not in costs.source:
            raise ConfigurationError(
                f"optimization.{vocabulary.RESOURCES[resource].budget}: the {vocabulary.RESOURCES[resource].label} of "
                "this model is not predicted, because no training step was recorded; `layerlens run` records one if "
                "the model is in memory, and otherwise says why"
            )


def _with_what_a_step_needs(costs: CostTable, config: OptimizationConfig) -> OptimizationConfig:
    """The configuration with a budget of parameters that leaves room for what every step needs (``CostTable.least``).

    Raises:
        InfeasibleError: there is no room for the frozen model.
    """
    for resource, (amount, per_parameter) in costs.least.items():
        budget = config.budgets()[resource]
        if budget is None:
            continue
        left = budget - amount
        if left < per_parameter:
            raise InfeasibleError(
                f"optimization.{vocabulary.RESOURCES[resource].budget}: {budget:g} is less than a forward pass of the "
                f"frozen model alone needs ({amount:.4g}); the smallest that works is above that"
            )
        most = float(left) / float(per_parameter)  # NumPy's would warn of a budget without end
        everything = float(costs.cost__ro[0].sum())
        if most < min(everything, config.max_trainable_params or everything):
            config = config.model_copy(update={"max_trainable_params": int(most)})
    return config
