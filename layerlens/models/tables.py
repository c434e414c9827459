"""One number for each option: what it is expected to gain, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from layerlens import vocabulary
from layerlens.models.charges import DepthCharge, GroupCharge
from layerlens.models.model_spec import Option
from layerlens.models.statistics import Calibration

RESOURCES = tuple(vocabulary.RESOURCES)


@dataclass(frozen=True)
class UtilityTable:
    """Expected gain of each option; "none" is 0.

    Args:
        options: the options, in the order of ``enumerate_options``.
        utility: float64 [n_options].
        model: name of the utility model.
        unit: what the utility is measured in, for the reader.
        calibration: how it was calibrated by proxies; None where it is what theory says.
    """

    options: tuple[Option, ...]
    utility: np.ndarray
    model: str
    unit: str
    calibration: Calibration | None = None

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
    """

    options: tuple[Option, ...]
    cost__ro: np.ndarray
    base: dict[str, float]
    source: dict[str, str] = field(default_factory=dict)
    charges: tuple[GroupCharge, ...] = ()
    depth: DepthCharge | None = None
