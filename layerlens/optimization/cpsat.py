"""CP-SAT on the core: proves the Lagrangian allocation optimal, betters it, or tightens the bound; never worsens it.

CP-SAT counts in integers. The scaling is chosen so that its answer proves something about the float problem:

- *Values* are multiplied by a power of two and rounded **up**, so the integer optimum is at least the scaled float one.
- *Costs* are multiplied by a power of two and rounded **down**, and so is the capacity: whatever fits in floats fits
  in integers (Σ⌊c·s⌋ <= ⌊Σ c·s⌋). The bound is then valid; rounding costs up instead would make every
  integer answer fit in floats, but would cut off allocations that meet a budget exactly, and the bound with them.
- What CP-SAT proposes is checked against the budgets in exact arithmetic. An allocation that fits only in integers is
  forbidden by name and the search goes on.

Where all numbers are integers (parameters, FLOPs), the scaling is exact. OR-Tools is imported here only, on first use.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from layerlens.exceptions import InfeasibleError, OptimizationError
from layerlens.models import AllocationProblem
from layerlens.optimization.charged import keeps, option_regrets, true_use, true_value
from layerlens.optimization.charged_solver import ChargedSearch, Refined
from layerlens.optimization.feasibility import conflict_message
from layerlens.optimization.lagrangian import Candidates, Dual, candidates_within
from layerlens.optimization.problem import ldexp
from layerlens.optimization.reduced import Reduced

# Sums of scaled integers stay below 2**SUM_BITS: exact in a double, and far from where CP-SAT's cuts would overflow.
VALUE_SUM_BITS, COST_SUM_BITS = 45, 45
# A larger core is left alone: building the model alone would take longer than the rest of the solve.
MAX_CANDIDATES = 20_000
# The same with charges, which count, too.
MAX_INDICATED = 5_000
# How often an allocation that fits in integers but not in floats is forbidden before giving up on the proof.
MAX_FORBIDDEN = 8


def refine(
    problem: AllocationProblem,
    reduced: Reduced,
    dual: Dual,
    choice: np.ndarray,
    value: float,
    bound: float,
    deterministic_time: float,
    seed: int,
) -> Refined | None:
    """Search the core for something better than ``choice``; None if OR-Tools is missing or the core is too large."""
    core = improving_core(reduced, dual, choice, value)
    if core is None:
        return Refined(choice, value, value)
    if len(core.option) - len(problem.layers) > MAX_CANDIDATES:
        return None
    model = _CoreModel.build(problem, core)
    return None if model is None else _refined(problem, model, choice, value, bound, deterministic_time, seed)


def refine_charged(search: ChargedSearch, deterministic_time: float, seed: int) -> Refined | None:
    """As :func:`refine`, of a problem with charges: among the options that its open modes leave."""
    problem, choice, value = search.problem, search.choice, search.value
    assert choice is not None
    modes = search.open_modes()
    if len(modes) > search.most_modes:
        return None
    others = max((mode.bound for mode in search.modes if mode not in modes), default=-math.inf)
    rest = max(value, ldexp(others, -search.reduced.value_exponent)) if others > -math.inf else value
    keep = np.zeros(len(problem.options), dtype=bool)
    keep[choice] = True
    for mode in modes:
        limit = mode.dual - search.scaled + search.charged.rounding(mode.state.price)
        keep |= option_regrets(search.charged, mode.state, mode.index) <= limit
    option = np.flatnonzero(keep)
    if len(option) - len(problem.layers) + len(problem.charges) > MAX_INDICATED:
        return None
    group = np.searchsorted(problem.offset, option, side="right") - 1
    model = _CoreModel.build(problem, Candidates(option, np.zeros(len(option)), group))
    if model is None:
        return None
    n_switches = search.charged.structure.n_switches
    stages = {mode.index // n_switches for mode in modes}
    lowest = problem.lowest_stage(choice)
    model.restrict_depth(stages | {search.charged.structure.n_stages if lowest is None else lowest})
    found = _refined(problem, model, choice, value, search.bound, deterministic_time, seed)
    return Refined(found.choice, found.value, max(found.bound, rest))


def _refined(
    problem: AllocationProblem,
    model: _CoreModel,
    choice: np.ndarray,
    value: float,
    bound: float,
    deterministic_time: float,
    seed: int,
) -> Refined:
    """Solve, and forbid what fits in integers only, until the answer fits or the time is over."""
    best, best_value = choice, value
    spent = 0.0
    for _ in range(MAX_FORBIDDEN):
        outcome = model.solve(best, deterministic_time - spent, seed)
        spent += outcome.deterministic_time
        if outcome.bound is not None:
            bound = min(bound, max(best_value, outcome.bound))
        if outcome.choice is None:
            break
        if keeps(problem, outcome.choice):
            found = true_value(problem, outcome.choice)
            if found > best_value:
                best, best_value = outcome.choice, found
            break
        model.forbid(outcome.choice)
        if spent >= deterministic_time:
            break
    return Refined(best, best_value, max(bound, best_value))


def improving_core(reduced: Reduced, dual: Dual, choice: np.ndarray, value: float) -> Candidates | None:
    """Options that an allocation better than ``value`` may have, and the incumbent's; None if there is no other.

    An option with regret above the dual's bound - value is in no better allocation. The limit is widened by the
    rounding of a regret, so no option is lost to it.
    """
    limit = dual.bound - ldexp(value, reduced.value_exponent) + reduced.rounding(dual.price)
    candidates = candidates_within(reduced.instance, dual, limit, also=choice)
    if len(candidates.option) == reduced.instance.n_groups:
        return None
    return candidates


def find_any(problem: AllocationProblem, deterministic_time: float, seed: int) -> np.ndarray:
    """Some allocation that fits, where repair found none (possible only when every option of some layer costs).

    Raises:
        InfeasibleError: there is none; for each budget, the smallest that would do beside the others.
        OptimizationError: none was found, and none was proved not to exist.
    """
    choice, infeasible = _search_whole(problem, deterministic_time, seed)
    if infeasible:
        needs = [_least_use(problem, r, deterministic_time, seed) for r in range(len(problem.resources))]
        smallest = {
            name: float(problem.base[r]) + need
            for r, (name, need) in enumerate(zip(problem.resources, needs, strict=True))
            if need is not None
        }
        raise InfeasibleError(conflict_message(problem, needs), smallest)
    if choice is None:
        raise OptimizationError(
            "found no allocation that fits, and no proof that there is none; raise a budget or "
            "refine_deterministic_time"
        )
    return choice


def _search_whole(problem: AllocationProblem, deterministic_time: float, seed: int) -> tuple[np.ndarray | None, bool]:
    """(the best allocation found over all options, whether it was proved that none fits)."""
    offset = np.asarray(problem.offset)
    option = np.arange(len(problem.options))
    group = np.searchsorted(offset, option, side="right") - 1
    model = _CoreModel.build(problem, Candidates(option, np.zeros(len(option)), group))
    if model is None:
        raise OptimizationError(
            "found no allocation that fits, and OR-Tools, which could continue the search, cannot be loaded"
        )
    for _ in range(MAX_FORBIDDEN):
        outcome = model.solve(None, deterministic_time, seed)
        if outcome.choice is None or keeps(problem, outcome.choice):
            return outcome.choice, outcome.infeasible
        model.forbid(outcome.choice)
    return None, False


def _least_use(problem: AllocationProblem, r: int, deterministic_time: float, seed: int) -> float | None:
    """The least that an allocation within all other budgets uses of resource ``r``; None where none was found."""
    others = [i for i in range(len(problem.resources)) if i != r]
    depth = problem.depth
    if depth is not None:
        cost__sr = np.asarray(depth.cost__sr, dtype=np.float64)
        depth = dataclasses.replace(depth, cost__sr=cost__sr[:, others], penalty__s=cost__sr[:, r])
    relaxed = dataclasses.replace(
        problem,
        value=-problem.cost__ro[r],
        cost__ro=problem.cost__ro[others],
        charges=tuple(
            dataclasses.replace(each, cost__r=np.asarray(each.cost__r)[others], penalty=float(each.cost__r[r]))
            for each in problem.charges
        ),
        depth=depth,
        resources=tuple(problem.resources[i] for i in others),
        capacity=problem.capacity[others],
        budget=problem.budget[others],
        base=problem.base[others],
    )
    choice, _ = _search_whole(relaxed, deterministic_time, seed)
    return None if choice is None else float(true_use(problem, choice)[r])


@dataclass(frozen=True)
class _Outcome:
    choice: np.ndarray | None
    bound: float | None
    infeasible: bool
    deterministic_time: float


@dataclass(frozen=True)
class _Indicator:
    """A variable that is 1 where something is paid for, what that costs, and what it takes off the value."""

    variable: Any
    cost__r: list[Fraction]
    penalty: Fraction


class _CoreModel:
    """The CP-SAT model of a core, and the way back from its integers to floats."""

    def __init__(self, cp_model: Any, problem: AllocationProblem, core: Candidates) -> None:
        self.cp_model = cp_model
        self.option, self.group = core.option, core.group
        self.n_groups = len(problem.layers)
        self.model = cp_model.CpModel()
        several = np.bincount(core.group, minlength=self.n_groups) > 1
        self.open = np.flatnonzero(several[core.group])
        self.fixed = core.option[~several[core.group]]
        self.variable = {int(c): self.model.new_bool_var("") for c in self.open}
        self.members: dict[int, list[int]] = {}
        for c in self.open:
            self.members.setdefault(int(core.group[c]), []).append(int(c))
        for members in self.members.values():
            self.model.add_exactly_one([self.variable[c] for c in members])
        self.candidate = {int(option): c for c, option in enumerate(core.option)} if problem.charged else {}
        self.stage: list[Any] = []
        self.indicators = self._charges(problem) + self._depth(problem)
        for r, (row, capacity) in enumerate(zip(problem.cost__ro, problem.capacity, strict=True)):
            self._limit(row, float(capacity), [(each.variable, each.cost__r[r]) for each in self.indicators])
        self._maximise(problem.value)

    @classmethod
    def build(cls, problem: AllocationProblem, core: Candidates) -> _CoreModel | None:
        try:
            from ortools.sat.python import cp_model
        except ImportError:
            return None
        return cls(cp_model, problem, core)

    def _causing(self, options: np.ndarray) -> tuple[bool, list[list[Any]]]:
        """Whether a fixed option is among these, and else the variables of those that are, group by group."""
        groups: dict[int, list[Any]] = {}
        for option in options.tolist():
            candidate = self.candidate.get(option)
            if candidate is None:
                continue
            if candidate not in self.variable:
                return True, []
            groups.setdefault(int(self.group[candidate]), []).append(self.variable[candidate])
        return False, list(groups.values())

    def _charges(self, problem: AllocationProblem) -> list[_Indicator]:
        """A variable for each group charge that an option may cause; a layer's options that cause it are at most it."""
        found = []
        order = np.argsort(problem.causes.charge, kind="stable")
        begin = np.searchsorted(problem.causes.charge[order], np.arange(len(problem.charges) + 1))
        for index, charge in enumerate(problem.charges):
            always, groups = self._causing(problem.causes.option[order[begin[index] : begin[index + 1]]])
            if not always and not groups:
                continue
            variable = self.model.new_constant(1) if always else self.model.new_bool_var("")
            for variables in groups:
                self.model.add(sum(variables) <= variable)
            cost__r = [Fraction(float(cost)) for cost in charge.cost__r]
            found.append(_Indicator(variable, cost__r, Fraction(charge.penalty)))
        return found

    def _depth(self, problem: AllocationProblem) -> list[_Indicator]:
        """A variable for each stage: the backward pass reaches it; what one reaches, all above it do, too."""
        depth = problem.depth
        if depth is None:
            return []
        stage__o = np.repeat(depth.stage__g, np.diff(problem.offset))
        below = np.zeros(len(stage__o), dtype=bool) if depth.below__o is None else np.asarray(depth.below__o)
        penalty = np.zeros(len(depth.names)) if depth.penalty__s is None else depth.penalty__s
        exact = [[Fraction(float(x)) for x in (*row, p)] for row, p in zip(depth.cost__sr, penalty, strict=True)]
        found: list[_Indicator] = []
        for s in range(len(depth.names)):
            always, groups = self._causing(np.flatnonzero((stage__o == s) & problem.reaches__o))
            variable = self.model.new_constant(1) if always else self.model.new_bool_var("")
            for variables in groups:
                self.model.add(sum(variables) <= variable)
            impossible, forbidden = self._causing(np.flatnonzero((stage__o == s) & below))
            if impossible:
                self.model.add(variable == 0)
            for variables in forbidden:
                self.model.add(sum(variables) <= 1 - variable)
            if found:
                self.model.add_implication(found[-1].variable, variable)
            above = exact[s + 1] if s + 1 < len(exact) else [Fraction(0)] * len(exact[s])
            step = [mine - next_ for mine, next_ in zip(exact[s], above, strict=True)]
            found.append(_Indicator(variable, step[:-1], step[-1]))
        self.stage = [each.variable for each in found]
        return found

    def restrict_depth(self, stages: set[int]) -> None:
        """The lowest stage is one of these; len(stages) stands for none."""
        for s in range(len(self.stage) + 1):
            if s in stages:
                continue
            if s == 0:
                self.model.add(self.stage[0] == 0)
            elif s == len(self.stage):
                self.model.add(self.stage[-1] == 1)
            else:
                self.model.add_implication(self.stage[s], self.stage[s - 1])

    def _limit(self, row: np.ndarray, capacity: float, indicators: list[tuple[Any, Fraction]]) -> None:
        """Σ⌊c·s⌋ <= ⌊(capacity + half its last place − fixed use)·s⌋: the relaxation that loses no allocation."""
        if capacity == math.inf:
            return
        room = Fraction(capacity) + Fraction(math.ulp(capacity)) / 2 - sum(map(Fraction, row[self.fixed]), Fraction(0))
        costs = {c: Fraction(row[self.option[c]]) for c in self.variable}
        least = {g: min(costs[c] for c in members) for g, members in self.members.items()}
        room -= sum(least.values(), Fraction(0))
        extra = {c: cost - least[int(self.group[c])] for c, cost in costs.items()}
        most = sum((max(extra[c] for c in members) for members in self.members.values()), Fraction(0))
        most += sum((cost for _, cost in indicators), Fraction(0))
        if most <= room:
            return
        scale = _power_of_two(most, COST_SUM_BITS)
        integers = [(self.variable[c], math.floor(cost * scale)) for c, cost in extra.items()]
        integers += [(variable, math.floor(cost * scale)) for variable, cost in indicators]
        common = math.gcd(*(n for _, n in integers)) or 1
        limit = math.floor(room * scale) // common
        self.model.add(sum(variable * (n // common) for variable, n in integers if n) <= limit)

    def _maximise(self, value: np.ndarray) -> None:
        """Σ⌈v·s⌉ over the core; ``upper`` turns a bound on it into one on the whole value."""
        values = {c: Fraction(value[self.option[c]]) for c in self.variable}
        least = {g: min(values[c] for c in members) for g, members in self.members.items()}
        extra = {c: v - least[int(self.group[c])] for c, v in values.items()}
        most = sum((max(extra[c] for c in members) for members in self.members.values()), Fraction(0))
        most += sum((each.penalty for each in self.indicators), Fraction(0))
        self.scale = _power_of_two(most, VALUE_SUM_BITS)
        integers = [(self.variable[c], math.ceil(v * self.scale)) for c, v in extra.items()]
        # A penalty is earned back where its indicator is 0.
        integers += [(each.variable, -math.floor(each.penalty * self.scale)) for each in self.indicators]
        self.common = math.gcd(*(n for _, n in integers)) or 1
        self.constant = sum(map(Fraction, value[self.fixed]), Fraction(0)) + sum(least.values(), Fraction(0))
        self.model.maximize(sum(variable * (n // self.common) for variable, n in integers if n))

    def _upper(self, objective_bound: float) -> float:
        """Rounded up to a float."""
        # The bound of an integer objective below 2**53 comes as an exact double, but for the rounding of its division.
        exact = self.constant + Fraction(math.ceil(objective_bound - 1e-6) * self.common) / self.scale
        nearest = float(exact)
        return nearest if Fraction(nearest) >= exact else math.nextafter(nearest, math.inf)

    def forbid(self, choice: np.ndarray) -> None:
        """Exclude one allocation."""
        self.model.add_bool_or([self.variable[c].negated() for c in self.variable if self._chosen(choice, c)])

    def _chosen(self, choice: np.ndarray, candidate: int) -> bool:
        return bool(choice[self.group[candidate]] == self.option[candidate])

    def solve(self, hint: np.ndarray | None, deterministic_time: float, seed: int) -> _Outcome:
        self.model.clear_hints()
        if hint is not None:
            for c, variable in self.variable.items():
                self.model.add_hint(variable, self._chosen(hint, c))
        solver = self.cp_model.CpSolver()
        solver.parameters.random_seed = seed
        solver.parameters.num_workers = 1
        solver.parameters.max_deterministic_time = max(deterministic_time, 1e-3)
        # Left to CP-SAT, Ctrl-C would end the search and the run would go on with a result that no other run repeats.
        solver.parameters.catch_sigint_signal = False
        status = _interruptible(solver, self.model)
        used = float(solver.response_proto.deterministic_time)
        if status == self.cp_model.MODEL_INVALID:
            raise OptimizationError(f"internal: CP-SAT rejects the model: {self.model.validate()}")
        if status == self.cp_model.INFEASIBLE:
            return _Outcome(None, None, True, used)
        if status not in (self.cp_model.OPTIMAL, self.cp_model.FEASIBLE):
            return _Outcome(None, None, False, used)  # stopped before there was a bound that means anything
        bound = self._upper(max(solver.best_objective_bound, solver.objective_value))
        choice = np.empty(self.n_groups, dtype=np.int64)
        choice[self.group] = self.option
        for c, variable in self.variable.items():
            if solver.boolean_value(variable):
                choice[self.group[c]] = self.option[c]
        return _Outcome(choice, bound, False, used)


def _power_of_two(size: Fraction, bits: int) -> Fraction:
    """A power of two that brings ``size`` to between 2**(bits - 2) and 2**bits; 1 for size 0."""
    if size <= 0:
        return Fraction(1)
    exponent = bits - 1 - size.numerator.bit_length() + size.denominator.bit_length()
    return Fraction(2**exponent) if exponent >= 0 else Fraction(1, 2**-exponent)


def _interruptible(solver: Any, model: Any) -> Any:
    """solver.solve(model) in a thread of its own, so that Ctrl-C reaches Python at once and stops the search."""
    outcome: list[Any] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            outcome.append(solver.solve(model))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="cp-sat", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.05)
    except BaseException:
        solver.stop_search()
        thread.join()
        raise
    if failure:
        raise failure[0]
    return outcome[0]
