"""What can be measured in one pass over the calibration data: one object for each statistic, registered by its name.

A statistic names the sums that it needs (``sums.Sum``; each is made once, however many need it) and says what
they come to. Interrupting, adding up over processes, streaming, predicting memory and keeping results in a file need
nothing beside that. One of your own is registered from outside::

    from layerlens.registry import STATISTICS
    STATISTICS.register("my-statistic", Statistic("my-statistic", sums=..., result=...))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from layerlens.exceptions import ProfilingError
from layerlens.profiling.accumulators import LayerRows, MatrixAccumulator
from layerlens.profiling.sums import InputBatch, MatrixBatch, Place, Sum
from layerlens.utils.when_used import ImportedWhenUsed

if TYPE_CHECKING:
    import torch
else:
    torch = ImportedWhenUsed("torch")

__all__ = ["InputBatch", "MatrixAccumulator", "MatrixBatch", "ModelSums", "Place", "Statistic", "Sum"]


@dataclass(frozen=True)
class ModelSums:
    """What the layers have to say together.

    Args:
        parts: what ``Statistic.part`` gave for each layer that it gave something for, in the order of the model.
        rows: what was added up over the layers.
        kernel_samples: how many samples the neural tangent kernel has.
        index: of each batch int64 [b], positions of its samples in the calibration set.
        labels: of each batch [b], or None where there is not one number for each sample.
    """

    parts: Sequence[np.ndarray]
    rows: LayerRows
    kernel_samples: int
    index: Sequence[torch.Tensor]
    labels: Sequence[torch.Tensor | None]


@dataclass(frozen=True)
class Statistic:
    """One statistic.

    Args:
        name: as it is registered and asked for.
        sums: of a matrix, from its place.
        input_sums: of the inputs that matrices share, zero where they are padding.
        result: from a matrix's sums to values by name: its ``fields``, or other names, numbers and float64 arrays,
            which are kept in ``extra`` under "STATISTIC.NAME". Empty where there is nothing to say.
        part: from a layer's sums to an array that ``model_result`` reads; None where the layer has no part in it.
        model_result: from all layers to values by name, as ``result``.
        module_values: measured on the whole model in memory, frozen: from (model, the block that backward passes reach
            down to, inputs of a full batch) to a value for each module. Such a statistic has no sums.
        module_absent: its value for modules that are called and not in it.
        fields: fields of ``MethodStatistics`` (``ModuleCosts``, ``ModelStatistics``) that it fills, or names in
            ``extra``; the first tells whether it was measured.
        working_floats: float64 numbers in memory while ``result`` is computed, predicted from the place.
        by_samples: whether it is made of the gradients of single samples, so that a loss of whole batches has none.
        steady: whether 16 samples rank layers as 256 others do (correlation 0.91 to 0.99 in the study).
        finite: whether values that are NaN or infinite are refused.
        version: raise it whenever the same inputs give other values: cached ones are then measured again.
    """

    name: str
    sums: Callable[[Place], Sequence[Sum]] = lambda place: ()
    input_sums: Sequence[Sum] = ()
    result: Callable[[MatrixAccumulator], Mapping[str, Any]] = lambda matrix: {}
    part: Callable[[MatrixAccumulator], np.ndarray | None] | None = None
    model_result: Callable[[ModelSums], Mapping[str, Any]] | None = None
    module_values: Callable[[torch.nn.Module, str | None, dict[str, torch.Tensor]], Mapping[str, float]] | None = None
    module_absent: float | None = None
    fields: tuple[str, ...] = ()
    working_floats: Callable[[Place], int] = lambda place: 0
    by_samples: bool = False
    steady: bool = False
    finite: bool = True
    version: int = 1

    def named(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A result by fields, and by "STATISTIC.NAME" for what has none: numbers, and arrays as float64.

        Raises:
            ProfilingError: an array has no real numbers.
        """
        own = {f"{self.name}.{name}": self._kept(name, x) for name, x in values.items() if name not in self.fields}
        return {name: value for name, value in values.items() if name in self.fields} | own

    def _kept(self, name: str, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        if value.dtype.kind not in "fiub":
            raise ProfilingError(f"the statistic {self.name} gives {name} as {value.dtype}; it must give float64")
        return value.astype(np.float64, copy=False)

    @property
    def identity(self) -> str:
        """Its part in the key of the sensitivity cache."""
        return self.name if self.version == 1 else f"{self.name}@{self.version}"
