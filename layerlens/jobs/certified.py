"""What no choice within the budgets can exceed, by its own prediction and not only as the solver counts it.

The solver adds up upper bounds of memory and time, which are fitted to its answer. What is proved of the best score
there says nothing of a choice that needs less than its sum. So the same problem is solved with lower bounds that add
up (:mod:`layerlens.cost.floor`): every choice whose step keeps the budgets is one of its choices, and its bound is one
on all of them.

Lower bounds are nearer where the lowest adapted layer is known. So each lowest stage of the chain of layers is a
problem of its own. Prices of all of them together show which can hold something better, and these are solved, the best
one first.

What is left then is mostly of options that read or replace a tensor that other options may keep too. The choices with
and without an option of such a layer are problems of their own.

Memory has a row for each of a few moments. Where the best choice within them needs more at another moment than the
budget has, that moment becomes a row and the problem is solved again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from layerlens.config import OptimizationConfig
from layerlens.cost.floor import Moment, first_moments, floor_table
from layerlens.exceptions import ConfigurationError, InfeasibleError, OptimizationError
from layerlens.models import NONE, AllocationProblem, CostTable, ModelSpec, UtilityTable
from layerlens.optimization import build_problem, cheapest_problem, solve, stage_bounds
from layerlens.optimization.cheapest import Reference, cost_share
from layerlens.optimization.constraints import one_rank_each
from layerlens.optimization.problem import exact_sum, scores_of, weights_of

ON_THE_STEP = ("vram_gb", "step_ms")
"""Resources that a recorded step predicts."""
MOST_SOLVED = 40
"""Problems of one lowest stage that are solved."""
MOST_TRIED, LEAST_NEARER = 16, 1e-9
"""Layers that are tried for a distinction, and the share by which one has to bring the sum nearer."""


@dataclass(frozen=True)
class Aim:
    """What is to be largest: the score, or, with a reference, minus the cost as a share of uniform LoRA's.

    Args:
        spec, utilities, costs, config, reference, kept: as of ``find_allocation``; costs with a recorded step.
    """

    spec: ModelSpec
    utilities: UtilityTable
    costs: CostTable
    config: OptimizationConfig
    reference: Reference | None
    kept: float | None

    @cached_property
    def names(self) -> list[str]:
        """Of the layers."""
        return [layer.name for layer in self.spec.layers]

    @property
    def weighs_memory(self) -> bool:
        """Whether memory is to be least; that of the last moment counts."""
        return self.reference is not None and "vram_gb" in self.config.minimised()

    @cached_property
    def _weights(self) -> dict[int, tuple[float, float]]:
        return weights_of(self.spec, self.costs, self.config)

    @cached_property
    def _score__o(self) -> np.ndarray:
        costs, utility = self.costs, np.asarray(self.utilities.utility, dtype=np.float64)
        return scores_of(costs.options, utility, costs.cost__ro, self.config, self._weights)

    def value(self, entries: np.ndarray) -> float:
        """Of a choice, by what is predicted of it."""
        if self.reference is not None:
            return -cost_share(self.config, self.reference, self.costs.total(entries))
        once = self.costs.paid_once__r(entries)
        paid = [-weight * (once[row] / per) for row, (weight, per) in self._weights.items()]
        return exact_sum([*self._score__o[entries].tolist(), *paid])

    def keeps(self, entries: np.ndarray) -> bool:
        """Whether the predicted step of a choice is within the budgets of memory and time."""
        total = self.costs.total(entries)
        budgets = {name: self.config.budgets()[name] for name in ON_THE_STEP}
        return all(budget is None or total[name] <= budget for name, budget in budgets.items())

    def problem_of(
        self, floor: CostTable, config: OptimizationConfig, idle: frozenset[str] = frozenset()
    ) -> AllocationProblem:
        """The problem with lower bounds; nothing may be chosen for the layers ``idle``."""
        limits = []
        if idle:
            barred = [float(option.layer in idle and option.method != NONE) for option in floor.options]
            limits = [("below the lowest adapted layer", np.array(barred), 0.0)]
        if self.reference is not None:
            return cheapest_problem(self.spec, self.utilities, floor, config, self.reference, self.kept, limits)
        return build_problem(self.spec, self.utilities, floor, config, weighed=self._weights, limits=limits)

    def base(self, floor: CostTable) -> float:
        """What every choice has of it, beside what the problem with lower bounds counts."""
        if self.reference is None:
            return 0.0
        return -cost_share(self.config, self.reference, floor.base | {"vram_gb": floor.moments[-1]})


@dataclass
class _Part:
    """Choices with one lowest stage (None: all), of one rank where one is served.

    Args:
        config: of the rank.
        stage: of the chain of the first lower bounds; the one after the last for choices that reach none.
        bound: proved of them.
        settled: nothing more can be proved of them without a distinction.
        chosen, idle: layers that they adapt, and that they do not.
        found: entries of the best choice within lower bounds.
    """

    config: OptimizationConfig
    stage: int | None
    bound: float
    settled: bool = False
    chosen: frozenset[str] = frozenset()
    idle: frozenset[str] = frozenset()
    found: np.ndarray | None = None


def prove(
    aim: Aim, entries: np.ndarray | None, value: float, *, seed: int, threads: int
) -> tuple[float, np.ndarray | None]:
    """A bound on every choice that keeps the budgets, and a better choice than the answer if the proof finds one.

    Args:
        aim: the problem.
        entries, value: the answer; None and minus infinity where there is none yet.
        seed, threads: of the solver.
    """
    use, tolerance, better = aim.costs.step, aim.config.gap_tolerance, None
    assert use is not None
    moments = first_moments(use) if entries is None else [*first_moments(use), use.timeline(entries).moment]
    first = floor_table(aim.costs, aim.names, _once(moments))
    stage__g = None if first.depth is None else first.depth.stage__g
    parts = _parts(aim, first, threads)
    for _ in range(MOST_SOLVED):
        top = max(parts, key=lambda part: part.bound, default=None)
        if top is None or top.bound - value <= tolerance * abs(top.bound):
            break
        if top.settled:
            layer = _undecided(aim, top, stage__g)
            if layer is None:
                break
            parts.remove(top)
            parts.append(replace(top, chosen=top.chosen | {layer}, settled=False))
            parts.append(replace(top, idle=top.idle | {layer}, settled=False))
            continue
        bound, found = _best(aim, top, moments, stage__g, seed, threads)
        top.bound, top.settled, top.found = min(top.bound, bound), True, found
        if found is None:
            continue
        if aim.keeps(found) and (reached := aim.value(found)) > value:
            value, better = reached, found
        moment = use.timeline(found).moment
        if moment != moments[-1] if aim.weighs_memory else moment not in moments:
            moments.append(moment)
            top.settled = False
    return max([value, *(part.bound for part in parts)]), better


def single_option(aim: Aim) -> np.ndarray | None:
    """Entries of the best choice that adapts one layer and keeps the budgets as predicted; None where none does."""
    use = aim.costs.step
    assert use is not None
    floor, best, value = floor_table(aim.costs, aim.names, first_moments(use)), None, -np.inf
    for config in one_rank_each(aim.config):
        try:
            problem = aim.problem_of(floor, config)
        except ConfigurationError:  # with this rank alone
            continue
        idle = np.array([option.method == NONE for option in problem.options])
        nothing = np.flatnonzero(idle)
        group__o = np.repeat(np.arange(len(problem.layers)), np.diff(problem.offset))
        if not np.array_equal(group__o[nothing], np.arange(len(problem.layers))):  # a layer that has to be adapted
            continue
        for option in np.flatnonzero(~idle):
            choice = nothing.copy()
            choice[group__o[option]] = option
            entries = problem.entries(choice)
            fits = np.all(problem.terms__rk(choice).sum(axis=1) <= problem.capacity)
            if fits and aim.value(entries) > value and aim.keeps(entries):
                best, value = entries, aim.value(entries)
    return best


def _once(moments: list[Moment]) -> list[Moment]:
    """Each once, where it comes last."""
    return list(dict.fromkeys(reversed(moments)))[::-1]


def _parts(aim: Aim, floor: CostTable, threads: int) -> list[_Part]:
    found = []
    for config in one_rank_each(aim.config):
        try:
            problem = aim.problem_of(floor, config)
        except ConfigurationError:  # with this rank alone
            continue
        if np.any(problem.capacity < 0.0):  # what every choice needs is above a budget
            continue
        if problem.depth is None or np.any(problem.capacity == 0.0):
            most = exact_sum(np.maximum.reduceat(problem.value, problem.offset[:-1]))
            found.append(_Part(config, None, most + aim.base(floor)))
        else:
            bounds = stage_bounds(problem, threads)
            found += [_Part(config, stage, bound + aim.base(floor)) for stage, bound in enumerate(bounds)]
    return found


def _undecided(aim: Aim, part: _Part, stage__g: np.ndarray | None) -> str | None:
    """The layer of the part's best choice that brings the sum at its peak nearest to what the choice needs, if known.

    Whether such a layer is adapted decides who pays for a tensor that several options may keep. None where no layer
    that shares a tensor makes a difference.
    """
    use, entries = aim.costs.step, part.found
    assert use is not None
    if entries is None:
        return None
    moment = use.timeline(entries).moment
    sharing: dict[int, set[str]] = {}
    for entry in entries.tolist():
        for storage in {*use.readers.get(entry, ()), *use.changed.get(entry, ())}:
            sharing.setdefault(int(storage), set()).add(aim.costs.options[entry].layer)
    shared = [layer for layers in sharing.values() if len(layers) > 1 for layer in sorted(layers)]
    lowest, below = _known(aim, part, stage__g)

    def counted(chosen: frozenset[str]) -> float:
        floor = floor_table(aim.costs, aim.names, [moment], lowest, below, chosen)
        return floor.moments[0] + exact_sum([floor.paid_once__r(entries)[-1], *floor.cost__ro[-1, entries].tolist()])

    least = counted(part.chosen) * (1.0 + LEAST_NEARER)
    candidates = list(dict.fromkeys(layer for layer in shared if layer not in part.chosen))[:MOST_TRIED]
    sums = {layer: counted(part.chosen | {layer}) for layer in candidates}
    nearest = max(sums, key=sums.__getitem__, default=None)
    return nearest if nearest is not None and sums[nearest] > least else None


def _known(aim: Aim, part: _Part, stage__g: np.ndarray | None) -> tuple[list[str] | None, frozenset[str]]:
    """(layers of which a part adapts one, None for all; layers that it does not adapt)."""
    if part.stage is None:
        return None, part.idle
    assert stage__g is not None
    stages = list(zip(aim.names, stage__g.tolist(), strict=True))
    return (
        [name for name, stage in stages if stage == part.stage],
        part.idle | {name for name, stage in stages if 0 <= stage < part.stage},
    )


def _best(
    aim: Aim, part: _Part, moments: list[Moment], stage__g: np.ndarray | None, seed: int, threads: int
) -> tuple[float, np.ndarray | None]:
    """(bound, entries) of the best choice of a part within lower bounds; no entries where none was found."""
    lowest, below = _known(aim, part, stage__g)
    if lowest and part.idle.issuperset(lowest):  # none is left to be the lowest
        return -np.inf, None
    floor = floor_table(aim.costs, aim.names, _once(moments), lowest, below, part.chosen)
    config = part.config
    try:
        problem = aim.problem_of(floor, config, below)
        allocation = solve(
            problem,
            refine=config.refine,
            refine_deterministic_time=config.refine_deterministic_time,
            gap_tolerance=config.gap_tolerance,
            seed=seed,
            threads=threads,
        )
    except InfeasibleError:  # none, or nothing at all
        return aim.base(floor), None
    except OptimizationError:  # none was found
        return np.inf, None
    return allocation.upper_bound + aim.base(floor), problem.entries(allocation.choice)
