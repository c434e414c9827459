"""One number for each option: what it is expected to gain, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from layerlens import vocabulary
from layerlens.models.charges import Causes, DepthCharge, GroupCharge
from layerlens.models.model_spec import NONE, Option
from layerlens.models.statistics import Calibration
from layerlens.models.step_use import StepUse

RESOURCES = tuple(vocabulary.RESOURCES)


@dataclass(frozen=True)
class Everywhere:
    """LoRA of one rank on every layer that takes it.

    Args:
        gain: the sum of its utilities.
        trainable_params: its parameters.
        replicates__b: the same sum by each of the calibration's replicates; empty without calibration.
    """

    gain: float
    trainable_params: int
    replicates__b: np.ndarray


@dataclass(frozen=True)
class UtilityTable:
    """Expected gain of each option; "none" is 0.

    Args:
        options: the options, in the order of ``enumerate_options``.
        utility: float64 [n_options].
        model: name of the utility model.
        unit: what the utility is measured in, for the reader.
        calibration: how it was calibrated by proxies; None where it is what theory says.
        everywhere: what LoRA of rank 32 on every layer that takes LoRA would gain, to compare a choice with; None where
            that is not known.
    """

    options: tuple[Option, ...]
    utility: np.ndarray
    model: str
    unit: str
    calibration: Calibration | None = None
    everywhere: Everywhere | None = None

    def first(self, count: int) -> UtilityTable:
        """The table of the first ``count`` options."""
        calibration = self.calibration
        if calibration is not None:
            calibration = replace(calibration, replicates__bo=calibration.replicates__bo[:, :count])
        return replace(self, options=self.options[:count], utility=self.utility[:count], calibration=calibration)


@dataclass(frozen=True)
class CostTable:
    """What each option adds to each resource, and what the frozen model needs before any option.

    Args:
        options: the options, in the order of ``enumerate_options``.
        cost__ro: float64 [n_resources, n_options], rows in the order of RESOURCES.
        base: what the frozen model uses of each resource.
        source: how each resource was found: "exact", "shapes", "saved-tensor hooks", "latency profile" ...
        charges: what groups of options pay once; ``options`` of a charge are entries of this table, and its ``cost__r``
            has the order of RESOURCES. ``build_problem`` brings them into the problem.
        depth: what the lowest adapted stage costs; its groups are the layers of the specification, in their order.
        least: what a choice uses of a resource at least, whatever else adds up: an amount, and one for each trainable
            parameter; absent: its base.
        step: what a given choice needs and takes in a training step; the rows, charges and depth of memory and of
            ``step_ms`` are upper bounds of it, which the solver adds up.
        checkpointed: blocks whose activations are computed again in the backward pass.
        moments: of a table of lower bounds of memory and ``step_ms`` (``cost.floor``): what every choice has alive at
            each moment of the step; what options and charges add to it comes after the rows of RESOURCES.
    """

    options: tuple[Option, ...]
    cost__ro: np.ndarray
    base: dict[str, float]
    source: dict[str, str] = field(default_factory=dict)
    charges: tuple[GroupCharge, ...] = ()
    depth: DepthCharge | None = None
    least: dict[str, tuple[float, float]] = field(default_factory=dict)
    step: StepUse | None = None
    checkpointed: tuple[str, ...] = ()
    moments: tuple[float, ...] = ()

    @cached_property
    def _offset(self) -> np.ndarray:
        """Where the options of each layer begin."""
        names = [option.layer for option in self.options]
        return np.array([0, *(i for i in range(1, len(names)) if names[i] != names[i - 1]), len(names)])

    @cached_property
    def _causes(self) -> Causes:
        return Causes(self.charges, len(self.options))

    def paid_once__r(self, entries: np.ndarray) -> np.ndarray:
        """float64 [rows of ``cost__ro``]: charges and depth of a choice (entries, "none" among them or not)."""
        chosen = {int(entry) for entry in entries if self.options[int(entry)].method != NONE}
        paid = np.zeros(len(self.cost__ro))
        for charge in sorted({int(charge) for entry in chosen for charge in self._causes.of(entry)}):
            paid = paid + self.charges[charge].cost__r
        if self.depth is not None and chosen:
            layer = np.searchsorted(self._offset, sorted(chosen), side="right") - 1
            stages = self.depth.stage__g[layer]
            if (stages >= 0).any():
                paid = paid + self.depth.cost__sr[stages[stages >= 0].min()]
        return paid

    def total(self, entries: np.ndarray) -> dict[str, float]:
        """What a choice uses of each resource, base included: the prediction for any choice."""
        entries = np.asarray(entries, dtype=np.int64)
        use = self.bound(entries)
        if self.step is not None:
            use |= {"vram_gb": self.step.gb(entries), "step_ms": self.step.ms(entries)}
        return use

    @cached_property
    def frozen(self) -> dict[str, float]:
        """What a choice that adapts nothing uses of each resource; ``base`` may have more in it (see ``step``)."""
        if self.step is None:
            return self.base
        nothing = np.zeros(0, dtype=np.int64)
        return self.base | {"vram_gb": self.step.gb(nothing), "step_ms": self.step.ms(nothing)}

    def bound(self, entries: np.ndarray) -> dict[str, float]:
        """What the solver counts for a choice."""
        entries = np.asarray(entries, dtype=np.int64)
        added = self.cost__ro[:, entries].sum(axis=1) + self.paid_once__r(entries)
        use = {name: self.base[name] + float(added[row]) for row, name in enumerate(RESOURCES)}
        for name, (amount, per_parameter) in self.least.items():
            use[name] = max(use[name], amount + per_parameter * use["trainable_params"])
        return use
