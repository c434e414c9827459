"""One pass over the calibration data with frozen weights: every layer's inputs meet its output gradients here.

An identity autograd function sits on each module's output. It saves the module's input through ``save_for_backward``
(so that checkpointing and offloading see it) and feeds the accumulators in its backward. The model is not changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from layerlens.exceptions import ProfilingError
from layerlens.integrations.attention import attention_outputs
from layerlens.integrations.weight_matrices import conv_patches, matrix_shape
from layerlens.models import LayerSpec, LayerStatistics, MethodStatistics, ModelSpec
from layerlens.profiling.accumulators import InputAccumulator, MatrixAccumulator
from layerlens.profiling.device import uses_kernels
from layerlens.profiling.kernel_sketch import KernelSketch
from layerlens.profiling.request import StatisticsRequest
from layerlens.profiling.sample_matrices import SampleMatrices, gram_matrix, join_calls
from layerlens.profiling.sketches import Projection
from layerlens.profiling.sum_shards import SumShards
from layerlens.tasks import Batch, Loss

Recorder = Callable[..., None]
Key = tuple[str, str]
"""(layer, method), or (parameter, "weight") for weights outside the layers."""

Tensors = torch.Tensor | Sequence[torch.Tensor]

FP16_LOSS_SCALE = 2.0**10
"""float16 loses gradients below 6e-8; a power of two scales them without rounding and is divided out at the end."""


class _Tap(torch.autograd.Function):
    """Identity in the forward pass; in the backward pass hands the gradient and the saved tensors to ``recorder``.

    ``anchor`` is a scalar that requires a gradient, so that the backward pass comes by although all weights are frozen.
    An output with a batch dimension of 1 that the model broadcasts (position embeddings) is expanded to ``batch``
    samples, so that its gradient comes back for each sample.
    """

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, anchor: torch.Tensor, batch: int, recorder: Recorder, *saved: torch.Tensor
    ) -> Any:
        ctx.save_for_backward(*saved)
        ctx.recorder = recorder
        ctx.broadcast = output.dim() > 1 and output.shape[0] == 1 and batch > 1
        return output.expand(batch, *output.shape[1:]) if ctx.broadcast else output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        saved = ctx.saved_tensors
        ctx.recorder(gradients[0], *saved)
        passed_on = gradients[0].sum(dim=0, keepdim=True) if ctx.broadcast else gradients[0]
        return passed_on, None, None, None, *([None] * len(saved))


class Capture:
    """The taps of one model and what they have accumulated.

    Args:
        model: the frozen model, in evaluation mode.
        spec: its layers.
        request: what to find.
        threads: for the kernels.
        other_modules: modules outside the layers whose weights are measured too (Linear, Conv1D, Conv2d, Embedding).
            Weights that several of them share are measured as one: the gradient of a tied weight is the sum over its
            uses.
        shards: where gradient sums are spread over processes, as the model is.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        spec: ModelSpec,
        request: StatisticsRequest,
        threads: int,
        other_modules: Sequence[str] = (),
        shards: SumShards | None = None,
    ) -> None:
        self.model = model
        self.spec = spec
        self.request = request
        self.threads = threads
        self.shards = shards
        self.other_modules = tuple(other_modules)
        self.accumulators: dict[Key, MatrixAccumulator] = {}
        self.inputs: dict[Key, InputAccumulator] = {}
        self.kernel_sketch = KernelSketch() if request.sketched_ntk else None
        self._anchor = torch.zeros((), requires_grad=True)
        self._loss_scale = 1.0
        self._calls: Counter[str] = Counter()
        self._users: dict[Key, set[str]] = {}
        self._pending: dict[Key, list[SampleMatrices]] = {}
        self._leaders: dict[str, str] = {}
        self._last_input: tuple[str, torch.Tensor] | None = None
        self._in_backward = False
        self._before = self._n_batch = 0
        self._counted = True
        self._weight_keys = self._tied_weights()

    def _tied_weights(self) -> dict[str, Key]:
        """Module -> key of its weight, which tied modules share."""
        first: dict[int, Key] = {}
        keys: dict[str, Key] = {}
        for name in self.other_modules:
            weight: Any = self.model.get_submodule(name).weight
            keys[name] = first.setdefault(id(weight), (f"{name}.weight", "weight"))
        return keys

    @contextmanager
    def open(self) -> Iterator[None]:
        """Put the taps on the model; they are gone afterwards, whatever happens."""
        with ExitStack() as stack:
            attentions: dict[int, LayerSpec] = {}
            for layer in self.spec.layers:
                module = self.model.get_submodule(layer.name)
                if layer.layer_type == "attention":
                    attentions[id(module)] = layer
                else:
                    stack.callback(module.register_forward_hook(self._dense_hook(layer)).remove)
            for module in self.model.modules():
                if getattr(module, "gradient_checkpointing", False) and self.request.backward:
                    stack.callback(module.register_forward_pre_hook(_open_graph).remove)
            for name in self.other_modules:
                module = self.model.get_submodule(name)
                stack.callback(module.register_forward_hook(self._weight_hook(name, module)).remove)

            def on_attention(module: torch.nn.Module, query: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
                layer = attentions.get(id(module))
                return output if layer is None else self._tap_attention(layer, query, output)

            if attentions:
                stack.enter_context(attention_outputs(self.model, on_attention))
            yield

    def run(self, batch: Batch, loss: Loss, *, before: int | None = None, counted: bool = True) -> torch.Tensor:
        """One forward and one backward pass; the loss of each sample, [b].

        Args:
            batch: the samples.
            loss: the loss of each sample.
            before: samples in the batches that come before it, when these are not all measured here; by default those
                of the batches that this was called with.
            counted: whether the passes are measured; else they are only made, as all processes must together where the
                model is spread over them.

        Raises:
            ProfilingError: the loss of a sample is not finite, or a layer cannot be measured.
        """
        self.begin(batch, before=before, counted=counted)
        with torch.set_grad_enabled(self.request.backward):
            loss__b = loss(self.model(**batch.inputs), batch)
        refuse_bad_loss(loss__b.detach(), batch)
        if self.request.backward:
            self.backward(loss__b.sum() * self.loss_scale)
        return loss__b.detach()

    def begin(self, batch: Batch, *, before: int | None = None, counted: bool = True) -> None:
        """A new forward pass, on this batch; see ``run``."""
        self._before = self._before + self._n_batch if before is None else before
        self._n_batch, self._counted = len(batch.index), counted
        self._half__b = batch.index % 2
        self._masks = {mask.shape[1]: None if bool(mask.all()) else mask for mask in batch.masks}
        self._calls.clear()
        self._last_input = None
        half_precision = any(parameter.dtype == torch.float16 for parameter in self.model.parameters())
        self._loss_scale = FP16_LOSS_SCALE if half_precision else 1.0

    def backward(self, outputs: Tensors, gradients: Tensors | None = None) -> None:
        """The backward pass from ``outputs``, the scaled loss or (with their gradients) activations below it."""
        self._last_input = None
        self._in_backward = True
        try:
            torch.autograd.backward(outputs, gradients)
            for key in list(self._pending):  # a module whose other call the loss does not depend on
                self._flush(key)
            if self.kernel_sketch is not None:
                self.kernel_sketch.end_batch(self._before)
        finally:
            self._in_backward = False
            self._pending.clear()

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by before the backward pass; divided out of everything that is collected."""
        return self._loss_scale

    def result(self, damping: float) -> tuple[LayerStatistics, ...]:
        """Statistics of every layer, in the order of the model.

        Raises:
            ProfilingError: a layer was never reached by the backward pass, so there is nothing to say about it.
        """
        if not self.request.backward:
            return tuple(
                LayerStatistics(layer.name, {method: MethodStatistics() for method in layer.methods})
                for layer in self.spec.layers
            )
        for layer in self.spec.layers:
            for method in layer.methods:
                if (layer.name, method) not in self.accumulators:
                    raise ProfilingError(
                        f"{layer.name}: no gradient reached this layer; the loss does not depend on it"
                    )
        return tuple(
            LayerStatistics(
                layer.name,
                {method: self.accumulators[layer.name, method].result(damping) for method in layer.methods},
            )
            for layer in self.spec.layers
        )

    def other_weights(self, damping: float) -> dict[str, MethodStatistics]:
        """Statistics of the other modules' weights that a gradient reached, by parameter name."""
        keys = dict.fromkeys(self._weight_keys.values())
        return {key[0]: self.accumulators[key].result(damping) for key in keys if key in self.accumulators}

    def covered_weights(self) -> dict[str, str]:
        """Parameter name of every module with statistics -> the parameter its statistics are under."""
        covered = {f"{name}.weight": key[0] for name, key in self._weight_keys.items() if key in self.accumulators}
        measured = [layer for layer in self.spec.layers if (layer.name, "lora") in self.accumulators]
        layers = [layer.name for layer in measured if layer.groups == 1]
        return covered | {f"{name}.weight": f"{name}.weight" for name in layers}

    def gram(self) -> np.ndarray:
        """⟨g_n, g_m⟩ of the samples, summed over the weights of all layers; float64 [sketches, n, n].

        One exact matrix, or several independent estimates of it where there are too many samples to keep.

        Raises:
            ProfilingError: there are no such layers.
        """
        names = [layer.name for layer in self.spec.layers if "lora" in layer.methods]
        if not names:
            raise ProfilingError("ntk: the model has no layer that LoRA can be put on, so there is no kernel of them")
        if self.kernel_sketch is not None:
            return self.kernel_sketch.grams(self.request.ntk_samples)
        grams = [gram_matrix(self.accumulators[name, "lora"].kept_in_order(), self.threads) for name in names]
        return np.sum(grams, axis=0)[None]

    def _dense_hook(self, layer: LayerSpec) -> Callable[[torch.nn.Module, tuple[Any, ...], torch.Tensor], torch.Tensor]:
        with_adapter = "adapter" in layer.methods
        module = self.model.get_submodule(layer.name)

        def record(gradient: torch.Tensor, h: torch.Tensor, y: torch.Tensor | None = None) -> None:
            if isinstance(module, torch.nn.Conv2d):
                z__bgti = conv_patches(module, h, groups=1)
                self._collect((layer.name, "lora"), gradient.flatten(2).mT[:, None], z__bgti, None, layer.name)
                return
            d__bgto, mask__bt = self._as_tokens(layer.name, gradient)
            if "lora" in layer.methods:
                leader = self._leaders.get(layer.name, layer.name)
                z__bgti, _ = self._as_tokens(layer.name, h)
                self._collect((layer.name, "lora"), d__bgto, z__bgti, mask__bt, leader)
            if y is not None:
                z__bgti, _ = self._as_tokens(layer.name, y)
                self._collect((layer.name, "adapter"), d__bgto, z__bgti, mask__bt, layer.name)

        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            self._count_call(layer.name)
            if not isinstance(module, torch.nn.Conv2d):  # whose inputs are patches
                self._follow(layer.name, args[0])
            saved = (args[0].detach(), output.detach()) if with_adapter else (args[0].detach(),)
            return self._tap(output, record, *saved)

        return hook

    def _weight_hook(
        self, name: str, module: Any
    ) -> Callable[[torch.nn.Module, tuple[Any, ...], torch.Tensor], torch.Tensor]:
        """For a module outside the layers: its weight's gradient alone, with the other uses of the same weight."""
        key = self._weight_keys[name]
        self._users.setdefault(key, set()).add(name)

        def record(gradient: torch.Tensor, saved: torch.Tensor) -> None:
            if isinstance(module, torch.nn.Embedding):
                if saved.shape[0] not in (1, len(gradient)):
                    raise ProfilingError(f"{name}: is looked up with {list(saved.shape)} indices, not for each sample")
                ids__bt = saved.expand(len(gradient), *saved.shape[1:]).flatten(1)
                rows__bti = gradient.flatten(1, -2) * self._scale_back
                if module.padding_idx is not None:
                    rows__bti = rows__bti * (ids__bt != module.padding_idx)[..., None]
                self._collect_matrices(key, SampleMatrices(ids__bt=ids__bt, rows__bti=rows__bti), module)
                return
            if isinstance(module, torch.nn.Conv2d):
                d__bgto = gradient.reshape(len(gradient), module.groups, -1, gradient[0, 0].numel()).mT
                z__bgti, mask__bt = conv_patches(module, saved), None
            else:
                (d__bgto, mask__bt), (z__bgti, _) = self._as_tokens(name, gradient), self._as_tokens(name, saved)
            self._collect(key, d__bgto, z__bgti, mask__bt, f"{name}|weight")

        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            self._count_call(name)
            return self._tap(output, record, args[0].detach())

        return hook

    def _tap_attention(self, layer: LayerSpec, query: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Prefix inputs ψ = (1, q/√d_head): the softmax over prefix keys is, to first order, affine in q."""
        self._count_call(layer.name)

        def record(gradient__btgo: torch.Tensor, query__bgti: torch.Tensor) -> None:
            scaled = query__bgti * query__bgti.shape[-1] ** -0.5
            psi__bgti = torch.cat([torch.ones_like(scaled[..., :1]), scaled], dim=-1)
            mask__bt = self._masks.get(gradient__btgo.shape[1])
            self._collect((layer.name, "prefix"), gradient__btgo.transpose(1, 2), psi__bgti, mask__bt, layer.name)

        return self._tap(output, record, query.detach())

    def _tap(self, output: torch.Tensor, record: Recorder, *saved: torch.Tensor) -> torch.Tensor:
        if not self.request.backward:
            return output
        return _Tap.apply(output, self._anchor, self._n_batch, record, *saved)

    @property
    def _scale_back(self) -> float:
        return 1.0 / self._loss_scale

    def _collect(
        self, key: Key, d__bgto: torch.Tensor, z__bgti: torch.Tensor, mask__bt: torch.Tensor | None, leader: str
    ) -> None:
        """Take one call of a multiplying module; ``leader`` is the layer that its inputs are summed for."""
        if mask__bt is not None:
            mask__bt = mask__bt.to(d__bgto.device)  # layers may be on several devices
            d__bgto = d__bgto * mask__bt[:, None, :, None].to(d__bgto.dtype)
        if self._loss_scale != 1.0:
            d__bgto = d__bgto.float() * self._scale_back
            z__bgti = z__bgti.float()
        if self.request.sketches and uses_kernels(d__bgto):
            # Once for all the sketches; narrow products of half precision are slower than those of float32 on the CPU.
            wide = torch.promote_types(d__bgto.dtype, torch.float32)
            d__bgto, z__bgti = d__bgto.to(wide), z__bgti.to(wide)
        if len(z__bgti) == 1 < len(d__bgto):
            z__bgti = z__bgti.expand(len(d__bgto), *z__bgti.shape[1:])
        if mask__bt is not None and self.request.masked_inputs:
            z__bgti = z__bgti * mask__bt[:, None, :, None].to(z__bgti.dtype)
        accumulator = self._accumulator(key, (d__bgto.shape[1], d__bgto.shape[3], z__bgti.shape[3]), leader)
        if self._counted and (leader == key[0] or key[1] == "weight"):
            accumulator.inputs.add(z__bgti, mask__bt)
        self._queue(key, SampleMatrices(d__bgto, z__bgti))

    def _collect_matrices(self, key: Key, matrices: SampleMatrices, module: Any) -> None:
        """Take one use of a weight that is looked up."""
        self._accumulator(key, matrix_shape(module), key[0])
        self._queue(key, matrices)

    def _accumulator(self, key: Key, shape: tuple[int, int, int], leader: str) -> MatrixAccumulator:
        if key not in self.accumulators:
            source = (leader, key[1])
            if source not in self.inputs:
                self.inputs[source] = self.new_inputs(source)
            self.accumulators[key] = self.new_matrix(key, self.inputs[source], shape)
        return self.accumulators[key]

    def new_inputs(self, source: Key) -> InputAccumulator:
        """Empty sums over the inputs of one layer, and of those that have the same."""
        inputs = InputAccumulator(self.request, self.threads)
        inputs.projection = None if source[1] == "weight" else Projection(f"{source[0]}|{source[1]}")
        return inputs

    def new_matrix(self, key: Key, inputs: InputAccumulator, shape: tuple[int, int, int]) -> MatrixAccumulator:
        """Empty sums for one matrix. The kernel is that of the layers' own weights, so only these are kept for it."""
        request = self.request if key[1] == "lora" else replace(self.request, ntk=False)
        projection = inputs.projection if shape[0] == 1 else None
        if projection is not None and projection.name != "|".join(key):  # the inputs are those of another layer
            projection = Projection("|".join(key))
        kernel = self.kernel_sketch if key[1] == "lora" else None
        return MatrixAccumulator(request, self.threads, inputs, shape, projection, kernel, self.shards)

    def _queue(self, key: Key, matrices: SampleMatrices) -> None:
        """Hold a call until all calls of this forward pass are there: their sum comes before any square."""
        waiting = self._pending.setdefault(key, [])
        waiting.append(matrices)
        users = self._users.get(key) or {key[0]}
        if len(waiting) == sum(self._calls[name] for name in users):
            self._flush(key)

    def _flush(self, key: Key) -> None:
        matrices = join_calls(self._pending.pop(key))
        if self._counted:
            self.accumulators[key].add(matrices, self._half__b, self._before)
        else:
            self.accumulators[key].add_nothing(matrices)

    def _count_call(self, name: str) -> None:
        if not self._in_backward:  # checkpointing runs forward passes again inside the backward pass
            self._calls[name] += 1

    def _follow(self, name: str, h: torch.Tensor) -> None:
        """Let a layer that gets the very input of the layer before it (query, key, value) share that one's input sums.

        Raises:
            ProfilingError: a layer that shared an input with another no longer does.
        """
        if self._in_backward:
            return
        previous, self._last_input = self._last_input, (name, h)
        same = previous is not None and previous[1] is h
        leader = self._leaders.get(previous[0], previous[0]) if previous and same else name
        if self._leaders.setdefault(name, leader) != leader:
            raise ProfilingError(
                f"{name}: has the same input as {self._leaders[name]} in some forward passes and not in others; its "
                "inputs cannot be measured"
            )

    def _as_tokens(self, name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[b, ..., k] as [b, 1, t, k], and the mask of its tokens where it has padding."""
        batch = self._n_batch
        if tensor.dim() < 2 or tensor.shape[0] not in (1, batch):
            raise ProfilingError(
                f"{name}: expected activations [batch, ..., features] of {batch} samples, got {list(tensor.shape)}; "
                "this layer cannot be measured sample by sample"
            )
        mask__bt = self._masks.get(tensor.shape[1]) if tensor.dim() == 3 else None
        return tensor.reshape(len(tensor), 1, -1, tensor.shape[-1]), mask__bt


def _open_graph(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Let a checkpointed block's input require a gradient: reentrant checkpointing passes none back otherwise."""
    if args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point() and not args[0].requires_grad:
        return (args[0].detach().requires_grad_(True), *args[1:])
    return None


def refuse_bad_loss(loss__b: torch.Tensor, batch: Batch) -> None:
    """Raise ProfilingError for the first sample whose loss is NaN or infinite."""
    bad = (~torch.isfinite(loss__b)).nonzero().flatten()
    if len(bad):
        first = int(bad[0])
        raise ProfilingError(
            f"the loss of calibration sample {int(batch.index[first])} is {float(loss__b[first])}; the model "
            "overflows on it: look for NaN weights or leave the sample out"
        )
