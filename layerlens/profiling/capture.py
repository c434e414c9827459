"""One pass over the calibration data with frozen weights: what the taps pass on goes into the declared sums."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from layerlens import kernels
from layerlens.exceptions import ProfilingError
from layerlens.integrations.weight_matrices import matrix_shape
from layerlens.models import LORA, LayerStatistics, MethodStatistics, ModelSpec
from layerlens.models.model_spec import EXPERTS
from layerlens.profiling.accumulators import SumShards
from layerlens.profiling.pass_sums import Key, PassSums
from layerlens.profiling.request import StatisticsRequest
from layerlens.profiling.sample_matrices import SampleMatrices, join_calls, uses_kernels
from layerlens.profiling.taps import Taps
from layerlens.tasks import Batch, Loss
from layerlens.tasks.losses import BatchLoss

NO_GRADIENT = (
    "the loss does not depend on any layer of the model (it has no gradient). Compute it from the model's output "
    "without torch.no_grad(), detach(), item() or argmax"
)
NOT_REACHED = "no gradient reaches it: the loss does not depend on it, or its weight is read without calling it"
Tensors = torch.Tensor | Sequence[torch.Tensor]

FP16_LOSS_SCALE = 2.0**10
"""float16 loses gradients below 6e-8; a power of two scales them without rounding and is divided out at the end."""


class Capture(Taps):
    """Forward and backward passes of one model, and what they add up to.

    Args:
        model, spec, other_modules: see ``Taps``.
        request: what to find.
        threads: for the kernels.
        shards: where sums are sharded over processes, as the model is.
        by_batches: whether a batch counts as one sample: what its rows have is added up before any square.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        spec: ModelSpec,
        request: StatisticsRequest,
        threads: int,
        other_modules: Sequence[str] = (),
        shards: SumShards | None = None,
        by_batches: bool = False,
    ) -> None:
        super().__init__(model, spec, other_modules, backward=request.backward, by_batches=by_batches)
        self.request = request
        self.sums = PassSums(request, threads, shards)
        self.unmeasured = self.sums.unmeasured
        self._pending: dict[Key, list[SampleMatrices]] = {}
        self._before = 0
        self._rows = 1
        self._counted = True
        self._read_padding = False
        self._recorded: Counter[str] = Counter()
        self._added: Counter[str] = Counter()

    def leave_out(self, name: str, reason: str) -> None:
        """Measure a layer, or a parameter, no further.

        Raises:
            ProfilingError: some statistic adds up over layers as they come, and has this one in it already.
        """
        measured_before = any(key[0] == name for key in self.sums.accumulators)
        if self.sums.rows.done and measured_before:
            raise ProfilingError(f"{name}: {reason}; leave statistics that add up over layers (ntk) out")
        super().leave_out(name, reason)
        for key in [key for key in self._pending if key[0] == name]:
            del self._pending[key]

    def run(
        self, batch: Batch, loss: Loss | BatchLoss, *, before: int | None = None, counted: bool = True
    ) -> torch.Tensor:
        """One forward and one backward pass; the loss of each sample, [b].

        Args:
            batch: the samples.
            loss: the loss of each sample, or of the batch.
            before: samples in the batches that come before it, when these are not all measured here; by default those
                of the batches that this was called with.
            counted: whether the passes are measured; else they are only made, as all processes must together where the
                model is spread over them.

        Raises:
            ProfilingError: the loss of a sample is not finite, or a layer cannot be measured.
        """
        self.begin(batch, before=before, counted=counted)
        with torch.set_grad_enabled(self.request.backward):
            if isinstance(loss, BatchLoss):
                loss__b = loss.checked(self.model, batch)
            else:
                loss__b = loss(self.model(**batch.inputs), batch)
        refuse_bad_loss(loss__b.detach(), batch, self.model, "batch" if self.by_batches else "sample")
        if self.request.backward:
            if not loss__b.requires_grad:
                raise ProfilingError(none_measured(self.unmeasured_layers()) or NO_GRADIENT)
            self.backward(loss__b.sum() * self.loss_scale)
        return loss__b.detach()

    def run_parts(self, batch: Batch, loss: Loss | BatchLoss, before: int, *, one_by_one: bool = False) -> torch.Tensor:
        """``run``, sample by sample where samples of a batch cannot be told apart."""
        if not one_by_one:
            return self.run(batch, loss, before=before)
        each = [batch.taken(torch.tensor([place])) for place in range(len(batch.index))]
        return torch.cat([self.run(one, loss, before=before + place) for place, one in enumerate(each)])

    def begin(self, batch: Batch, *, before: int | None = None, counted: bool = True) -> None:
        """A new forward pass, on this batch; see ``run``."""
        self._before = self._before + self._n_batch // self._rows if before is None else before
        self._rows = 1 if self.by_batches else batch.rows
        self._n_batch, self._counted = len(batch.index) * self._rows, counted
        self._half__b = batch.index % 2
        # Convolutions of a conformer read padding without a mask, so gradients reach it.
        self._read_padding = batch.frames is not None
        masks = () if self.by_batches else batch.masks
        self._masks = {mask.shape[1]: None if bool(mask.all()) else mask for mask in masks}
        self._calls.clear()
        self._read.clear()
        self._last_input = None
        self.sums.rows.begin(self._before)
        half_precision = any(parameter.dtype == torch.float16 for parameter in self.model.parameters())
        self.loss_scale = FP16_LOSS_SCALE if half_precision else 1.0

    def backward(self, outputs: Tensors, gradients: Tensors | None = None) -> None:
        """The backward pass from ``outputs``, the scaled loss or (with their gradients) activations below it.

        ``loss_scale`` is what the loss is multiplied by before, and divided out of everything that is collected.
        """
        self.settle_leaders()
        self._recorded.clear()
        self._added.clear()
        self._in_backward = True
        try:
            torch.autograd.backward(outputs, gradients)
            for key in list(self._pending):  # a module whose other call the loss does not depend on
                self._flush(key)
            self.sums.rows.end()
        finally:
            self._in_backward = False
            self._pending.clear()

    def result(self) -> tuple[LayerStatistics, ...]:
        """Statistics of the layers that could be measured, in the model's order; ``unmeasured`` has the others."""
        layers = self.spec.layers
        if not self.request.backward:
            return tuple(LayerStatistics(x.name, {method: MethodStatistics() for method in x.methods}) for x in layers)
        for layer in layers:
            if any((layer.name, method) not in self.sums.accumulators for method in layer.methods):
                self.unmeasured.setdefault(layer.name, NOT_REACHED)
        return tuple(
            LayerStatistics(x.name, {method: self.sums.result((x.name, method)) for method in x.methods})
            for x in layers
            if x.name not in self.unmeasured
        )

    def other_weights(self) -> dict[str, MethodStatistics]:
        """Statistics of the other modules' weights that a gradient reached, by parameter name."""
        keys = [key for key in dict.fromkeys(self._weight_keys.values()) if key[0] not in self.unmeasured]
        return {key[0]: self.sums.result(key) for key in keys if key in self.sums.accumulators}

    def unmeasured_layers(self) -> dict[str, str]:
        """Layers of the model without statistics, with the reason, in the order of the model; once all is measured."""
        return {x.name: self.unmeasured[x.name] for x in self.spec.layers if x.name in self.unmeasured}

    def unmeasured_weights(self) -> dict[str, str]:
        """Parameters without statistics that the pass itself has found a reason for."""
        weights = {key[0] for key in self._weight_keys.values()}
        stacked = {x.name for x in self.spec.layers if x.layer_type == EXPERTS}
        missing = self.unmeasured_layers().items()
        of_layers = {name if name in stacked else f"{name}.weight": reason for name, reason in missing}
        return of_layers | {name: reason for name, reason in self.unmeasured.items() if name in weights}

    def covered_weights(self) -> dict[str, str]:
        """Parameter name of every module with statistics -> the parameter its statistics are under."""
        known = {key for key in self.sums.accumulators if key[0] not in self.unmeasured}
        covered = {f"{name}.weight": key[0] for name, key in self._weight_keys.items() if key in known}
        layers = [layer for layer in self.spec.layers if (layer.name, LORA) in known and layer.groups == 1]
        names = [x.name if x.layer_type == EXPERTS else f"{x.name}.weight" for x in layers]
        return covered | {name: name for name in names}

    def collect(
        self, key: Key, d__bgto: torch.Tensor, z__bgti: torch.Tensor, mask__bt: torch.Tensor | None, leader: str,
        counts__bg: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Take one call of a multiplying module; see ``Taps.collect``."""
        if mask__bt is not None:
            mask__bt = mask__bt.to(d__bgto.device)  # layers may be on several devices
            if not self._read_padding:
                d__bgto = d__bgto * mask__bt[:, None, :, None].to(d__bgto.dtype)
        if self.loss_scale != 1.0:
            d__bgto = d__bgto.float() * (1.0 / self.loss_scale)
            z__bgti = z__bgti.float()
        if self.request.projects and uses_kernels(d__bgto):
            # Once for all the sketches; narrow products of half precision are slower than those of float32 on the CPU.
            wide = torch.promote_types(d__bgto.dtype, torch.float32)
            d__bgto, z__bgti = d__bgto.to(wide), z__bgti.to(wide)
        if len(z__bgti) == 1 < len(d__bgto):
            z__bgti = z__bgti.expand(len(d__bgto), *z__bgti.shape[1:])
        inputs__bgti = z__bgti
        if mask__bt is not None and self.request.input_sums:
            inputs__bgti = z__bgti * mask__bt[:, None, :, None].to(z__bgti.dtype)
            z__bgti = z__bgti if self._read_padding else inputs__bgti
        if self._rows > 1:
            d__bgto, z__bgti = self._as_samples(d__bgto), self._as_samples(z__bgti)
            inputs__bgti = self._as_samples(inputs__bgti)
            mask__bt = None if mask__bt is None else mask__bt.reshape(-1, self._rows * mask__bt.shape[1])
        source = leader, key[1]
        matrix = self.sums.matrix(key, (d__bgto.shape[1], d__bgto.shape[3], z__bgti.shape[3]), source)
        if self._counted and (leader == key[0] or key[1] in (LORA, "weight")) and self._is_first(key, leader):
            matrix.inputs.add(inputs__bgti, mask__bt, counts__bg)
        self._queue(key, SampleMatrices(d__bgto, z__bgti))

    def _is_first(self, key: Key, leader: str) -> bool:
        """Whether the inputs of this call are not added up yet by another layer that reads the same."""
        if key[1] != LORA:
            return True
        self._recorded[key[0]] += 1
        if self._recorded[key[0]] <= self._added[leader]:
            return False
        self._added[leader] += 1
        return True

    def collect_lookup(
        self, key: Key, matrices: SampleMatrices, module: Any, mask__bt: torch.Tensor | None = None
    ) -> None:
        """Take one use of a weight that is looked up; see ``Taps.collect_lookup``."""
        of_layer = key[1] == LORA
        matrix = self.sums.matrix(key, matrix_shape(module), key, looked_up=of_layer)
        if of_layer and self._counted and matrices.ids__bt is not None:
            mask__bt = None if mask__bt is None else mask__bt.to(matrices.first.device)
            matrix.inputs.add_indices(matrices.ids__bt, mask__bt, matrix.place.shape[1], matrices.first)
        if self._rows > 1 and matrices.ids__bt is not None and matrices.rows__bti is not None:
            ids, rows = matrices.ids__bt, matrices.rows__bti
            matrices = SampleMatrices(
                ids__bt=ids.reshape(-1, self._rows * ids.shape[1]),
                rows__bti=rows.reshape(-1, self._rows * rows.shape[1], rows.shape[2]),
            )
        self._queue(key, matrices)

    def _as_samples(self, rows__rgtk: torch.Tensor) -> torch.Tensor:
        """The rows of each sample one after the other along its tokens: [b · rows, g, t, k] -> [b, g, rows · t, k]."""
        return rows__rgtk.unflatten(0, (-1, self._rows)).transpose(1, 2).flatten(2, 3)

    def _queue(self, key: Key, matrices: SampleMatrices) -> None:
        """Hold a call until all calls of this forward pass are there: their sum comes before any square."""
        waiting = self._pending.setdefault(key, [])
        waiting.append(matrices.as_one() if self.by_batches else matrices)
        if len(waiting) == self.uses(key):
            self._flush(key)

    def _flush(self, key: Key) -> None:
        matrices = join_calls(self._pending.pop(key))
        self.sums.accumulators[key].add(matrices, self._half__b, self._before, counted=self._counted)


def none_measured(unmeasured: Mapping[str, str]) -> str:
    """The first reasons why layers could not be measured, where none could; "" without any."""
    reasons = [f"{name}: {reason}" for name, reason in list(unmeasured.items())[:3]]
    return f"none of the layers could be measured; {'; '.join(reasons)}" if reasons else ""


def refuse_bad_loss(loss__b: torch.Tensor, batch: Batch, model: torch.nn.Module, of: str = "sample") -> None:
    """Raise ProfilingError for the first sample whose loss is NaN or infinite, with the weights that are so."""
    bad = (~torch.isfinite(loss__b)).nonzero().flatten()
    if len(bad):
        first = int(bad[0])
        raise ProfilingError(
            f"the loss of calibration {of} {int(batch.index[first])} is {float(loss__b[first])}; the model "
            f"overflows on it: {bad_weights(model) or 'leave the {of} out, since all weights here are finite'}"
        )


def bad_weights(model: torch.nn.Module, most: int = 4) -> str:
    """The first weights in memory that are NaN or infinite, by name and with how many; "" where there are none."""
    read = {name: weight.detach() for name, weight in model.named_parameters() if _readable(weight)}
    counts = kernels.ragged_statistics(read.values()).non_finite
    bad = [f"{name} ({count} of {read[name].numel()})" for name, count in zip(read, counts, strict=True) if count]
    return f"weights are not finite: {', '.join(bad[:most])}{' ...' if len(bad) > most else ''}" if bad else ""


def _readable(weight: torch.Tensor) -> bool:
    return uses_kernels(weight) and weight.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
