"""The multiple-choice multidimensional knapsack problem (MMKP), its answer, and what a budget buys.

Axes: g groups (layers), o options of all groups one after the other, r resources.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from layerlens.models.charges import Causes, DepthCharge, GroupCharge
from layerlens.models.model_spec import NONE, Option


@dataclass(frozen=True)
class AllocationProblem:
    """Choose exactly one option in each group: maximise the sum of values, and keep every resource within its capacity.

    Args:
        layers: group names, length n_groups.
        options: all options, sorted by group: group g owns ``options[offset[g]:offset[g + 1]]``.
        offset: int64 [n_groups + 1].
        value: float64 [n_options], finite; the solver maximises its sum.
        cost__ro: float64 [n_resources, n_options], finite and >= 0, C-contiguous.
        resources: resource names, length n_resources.
        capacity: float64 [n_resources], the amount that the options may use together (budget minus base).
        budget: float64 [n_resources], the user's budgets.
        base: float64 [n_resources], the amount that the frozen model uses.
        members__o: for each option, its entries in the utility and cost tables: one for each layer of the group, so
            several if layers must choose alike. If empty, option o has the entry o.
        entry_value: float64 [n_entries], score of every table entry; equal to ``value`` if ``members__o`` is empty.
        charges: costs that a group of options pays once, in addition to the options' own costs.
        depth: costs that depend on the lowest adapted stage; None if there are none.
    """

    layers: tuple[str, ...]
    options: tuple[Option, ...]
    offset: np.ndarray
    value: np.ndarray
    cost__ro: np.ndarray
    resources: tuple[str, ...]
    capacity: np.ndarray
    budget: np.ndarray
    base: np.ndarray
    members__o: tuple[tuple[int, ...], ...] = ()
    entry_value: np.ndarray | None = None
    charges: tuple[GroupCharge, ...] = ()
    depth: DepthCharge | None = None

    @property
    def charged(self) -> bool:
        """Whether costs are more than sums over options."""
        return bool(self.charges) or self.depth is not None

    @cached_property
    def causes(self) -> Causes:
        """Which group charges each option causes."""
        return Causes(self.charges, len(self.options))

    @cached_property
    def reaches__o(self) -> np.ndarray:
        """bool [n_options]: which options make the backward pass reach the stage of their group."""
        if self.depth is None:
            return np.zeros(len(self.options), dtype=bool)
        if self.depth.reaches__o is None:
            reaches = np.array([option.method != NONE for option in self.options], dtype=bool)
        else:
            reaches = np.asarray(self.depth.reaches__o, dtype=bool)
        return reaches & (np.repeat(self.depth.stage__g, np.diff(self.offset)) >= 0)

    def lowest_stage(self, choice: np.ndarray) -> int | None:
        """The lowest stage that the backward pass of ``choice`` has to reach; None where it reaches none."""
        if self.depth is None:
            return None
        stage = np.asarray(self.depth.stage__g)[self.reaches__o[choice]]
        return int(stage.min()) if stage.size else None

    def paid(self, choice: np.ndarray) -> tuple[int, ...]:
        """The group charges that ``choice`` causes, ascending."""
        if not self.charges:
            return ()
        return tuple(self.causes.of_all(np.asarray(choice, dtype=np.int64)).tolist())

    def terms__rk(self, choice: np.ndarray) -> np.ndarray:
        """float64 [n_resources, k]: all that ``choice`` uses: its options, then its charges, then its depth.

        The use of a resource is the correctly rounded sum of its row.
        """
        parts = [self.cost__ro[:, choice]]
        parts += [np.asarray(self.charges[charge].cost__r, dtype=np.float64)[:, None] for charge in self.paid(choice)]
        if self.depth is not None and (stage := self.lowest_stage(choice)) is not None:
            parts.append(np.asarray(self.depth.cost__sr, dtype=np.float64)[stage][:, None])
        return np.concatenate(parts, axis=1)

    def value_terms(self, choice: np.ndarray) -> np.ndarray:
        """float64 [k]: what the value of ``choice`` is the correctly rounded sum of: its options, less penalties."""
        penalties = [-self.charges[charge].penalty for charge in self.paid(choice)]
        if self.depth is not None and self.depth.penalty__s is not None:
            stage = self.lowest_stage(choice)
            penalties += [] if stage is None else [-float(self.depth.penalty__s[stage])]
        return np.concatenate((self.value[choice], penalties))

    def allowed(self, choice: np.ndarray) -> bool:
        """Whether ``choice`` has no option at or above its lowest stage that is possible only below it."""
        stage = self.lowest_stage(choice)
        if stage is None or self.depth is None or self.depth.below__o is None:
            return True
        reached = np.asarray(self.depth.stage__g) >= stage
        return not bool(np.any(np.asarray(self.depth.below__o)[choice] & reached))

    def choice_of(self, entries: Collection[int]) -> np.ndarray | None:
        """int64 [n_groups], the choice that stands for these table entries; None where a group has no such option."""
        members = self.members__o or tuple((option,) for option in range(len(self.options)))
        held = [option for option, own in enumerate(members) if all(entry in entries for entry in own)]
        group = np.searchsorted(self.offset, held, side="right") - 1
        return np.array(held, dtype=np.int64) if np.array_equal(group, np.arange(len(self.layers))) else None

    def entries(self, choice: np.ndarray) -> np.ndarray:
        """int64 [n_layers], ascending: the table entries that ``choice`` (an option for each group) stands for."""
        if not self.members__o:
            return np.asarray(choice, dtype=np.int64)
        return np.sort([entry for option in choice for entry in self.members__o[option]])


@dataclass(frozen=True)
class Allocation:
    """A solution of the problem with its certificate.

    Args:
        choice: int64 [n_groups], index into ``problem.options`` of the chosen option of each group.
        value: sum of the chosen values.
        upper_bound: proved bound: no allocation within the budgets has a larger value.
        used: float64 [n_resources], the amount that the chosen options use, without base.
        multipliers: float64 [n_resources], Lagrange multiplier (shadow price) of each resource, in value per unit.
        status: "optimal" (the gap is proved to be within ``gap_tolerance``) or "feasible".
        solver: the stages that ran, such as "greedy-lagrangian" or "greedy-lagrangian + cp-sat".
    """

    choice: np.ndarray
    value: float
    upper_bound: float
    used: np.ndarray
    multipliers: np.ndarray
    status: str
    solver: str

    @property
    def gap(self) -> float:
        """Relative optimality gap (upper_bound - value) / |upper_bound|; 0 if both are 0."""
        difference = max(0.0, self.upper_bound - self.value)
        return difference / abs(self.upper_bound) if self.upper_bound != 0.0 else difference


@dataclass(frozen=True)
class SolverEvent:
    """One line of the solver's log: the state after a stage.

    Args:
        seconds: wall-clock time since the start. This is the only field that differs between two runs.
        stage: "multipliers", "guided search", "beam search" or "cp-sat".
        value: value of the best allocation so far; None if there is none yet.
        upper_bound: the bound that is proved so far.
    """

    seconds: float
    stage: str
    value: float | None
    upper_bound: float


@dataclass(frozen=True)
class LayerExplanation:
    """One layer's choice at the shadow prices of the budgets.

    The *score* of an option is its value minus what it uses of each budget at the budget's shadow price.

    Args:
        layers: the layer, or the layers that choose alike.
        chosen: the option in the allocation.
        runner_up: the other option with the highest score; None if the layer has a single option.
        value_to_flip: how much more value the runner-up would need to score like the chosen one. Below 0 where the
            runner-up scores higher and the chosen one is there because it fits what the others leave.
        cost_to_flip: for each resource with a price, how much less the runner-up would have to use.
        fits: whether the runner-up would fit the budgets in place of the chosen option, all else equal.
    """

    layers: tuple[str, ...]
    chosen: Option
    runner_up: Option | None
    value_to_flip: float | None
    cost_to_flip: dict[str, float]
    fits: bool


@dataclass(frozen=True)
class FrozenStage:
    """Why the backward pass does not go down to a stage.

    Args:
        name: of the stage.
        cost: what each budgeted resource would cost more for going down to it, before any option there.
        gain: what the best options of the stages that the pass would newly reach add to the score, at the budgets'
            shadow prices; they have costs of their own, too.
        share: ``gain`` as a share of the score.
    """

    name: str
    cost: dict[str, float]
    gain: float
    share: float


@dataclass(frozen=True)
class FrontierRow:
    """A budget and what it buys.

    Args:
        kind: "hull" (a point of the exact concave hull, other budgets left aside), "bound" (a point of a curve that no
            choice exceeds, other budgets left aside) or "certified" (an allocation of the solver, all budgets kept).
        budget: of the resource that varies, base included.
        score: value of the allocation.
        upper_bound: no allocation within the budgets has a larger value.
        gap, status: as in an ``Allocation``.
        layer, method, rank: for a hull point, the one choice that changes from the point before; else "", "", 0.
    """

    kind: str
    budget: float
    score: float
    upper_bound: float
    gap: float
    status: str
    layer: str = ""
    method: str = ""
    rank: int = 0
