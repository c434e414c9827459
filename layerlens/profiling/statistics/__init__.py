"""The statistics that one pass over the calibration data can measure: one object each, registered by its name.

A statistic names the sums that it needs (``sums.Sum``) and computes its result from them. Each sum is computed once,
even if several statistics need it. Resuming, several processes, streaming, the prediction of memory and the file format
need nothing else. Register your own statistic::

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
        name: name in the registry and in configurations.
        sums: function from a matrix's place to the sums that it needs of the matrix.
        input_sums: sums of the inputs that matrices share. Inputs are zero at padding.
        result: function from a matrix's sums to values by name. A name in ``fields`` fills that field; other names
            (numbers or float64 arrays) go to ``extra`` as "STATISTIC.NAME". Empty if there is no result.
        part: function from a layer's sums to an array for ``model_result``; it returns None if the layer does not take
            part.
        model_result: function from the parts of all layers to values by name, as in ``result``.
        module_values: (frozen model in memory, lowest block of the backward pass, inputs of a full batch) -> a value
            for each module. Such a statistic has no sums.
        module_absent: value of modules that are called but missing in ``module_values``.
        fields: fields of ``MethodStatistics`` (``ModuleCosts``, ``ModelStatistics``) that the statistic fills, or names
            in ``extra``. The first one shows whether the statistic was measured.
        working_floats: function from a place to the number of float64 values in memory while ``result`` runs.
        by_samples: True if the statistic needs the gradients of single samples, so a loss of whole batches cannot give
            it.
        steady: True if 16 samples rank layers as 256 others do (correlation 0.91 to 0.99 in the study).
        finite: True if values that are NaN or infinite are refused.
        version: increase it when the same inputs give other values, so that cached values are measured again.
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
