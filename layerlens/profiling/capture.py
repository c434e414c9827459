"""One pass over the calibration data with frozen weights: every layer's inputs meet its output gradients here.

An identity autograd function sits on each module's output. It saves the module's input through ``save_for_backward``
(so that checkpointing and offloading see it) and feeds the accumulators in its backward. The model is not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from layerlens.exceptions import ProfilingError
from layerlens.integrations.attention import attention_outputs
from layerlens.models import LayerSpec, LayerStatistics, ModelSpec
from layerlens.profiling.accumulators import MatrixAccumulator

Recorder = Callable[..., None]


class _Tap(torch.autograd.Function):
    """Identity in the forward pass; in the backward pass hands the gradient and the saved tensors to ``recorder``.

    ``anchor`` is a scalar that requires a gradient, so that the backward pass comes by although all weights are frozen.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, anchor: torch.Tensor, recorder: Recorder, *saved: torch.Tensor) -> Any:
        ctx.save_for_backward(*saved)
        ctx.recorder = recorder
        ctx.n_saved = len(saved)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.recorder(gradients[0], *ctx.saved_tensors)
        return gradients[0], None, None, *([None] * ctx.n_saved)


@dataclass
class Capture:
    """The taps of one model and what they have accumulated.

    Args:
        model: the frozen model, in evaluation mode.
        spec: its layers.
        with_factors: also accumulate the K-FAC factors, which the whitened spectra need.
        threads: for the kernels.
    """

    model: torch.nn.Module
    spec: ModelSpec
    with_factors: bool
    threads: int
    accumulators: dict[tuple[str, str], MatrixAccumulator] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._anchor = torch.zeros((), requires_grad=True)
        self._mask__bt = torch.zeros(0)
        self._half__b = torch.zeros(0)
        self._called: set[str] = set()
        for layer in self.spec.layers:
            for method in layer.methods:
                self.accumulators[layer.name, method] = MatrixAccumulator(self.with_factors, self.threads)

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

            def on_attention(module: torch.nn.Module, query: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
                layer = attentions.get(id(module))
                return output if layer is None else self._tap_attention(layer, query, output)

            if attentions:
                stack.enter_context(attention_outputs(self.model, on_attention))
            yield

    def start_batch(self, mask__bt: torch.Tensor, half__b: torch.Tensor) -> None:
        """Tell the taps which tokens of the coming batch are real and which half each sample belongs to."""
        self._mask__bt, self._half__b = mask__bt, half__b
        self._called.clear()

    def result(self, damping: float) -> tuple[LayerStatistics, ...]:
        """Statistics of every layer, in the order of the model.

        Raises:
            ProfilingError: a layer was never reached by the backward pass, so there is nothing to say about it.
        """
        for (name, _), accumulator in self.accumulators.items():
            if sum(accumulator.n_samples) == 0:
                raise ProfilingError(f"{name}: no gradient reached this layer; the loss does not depend on it")
        return tuple(
            LayerStatistics(
                layer.name,
                {method: self.accumulators[layer.name, method].result(damping) for method in layer.methods},
            )
            for layer in self.spec.layers
        )

    def _dense_hook(self, layer: LayerSpec) -> Callable[[torch.nn.Module, tuple[Any, ...], torch.Tensor], torch.Tensor]:
        with_adapter = "adapter" in layer.methods

        def record(gradient: torch.Tensor, h: torch.Tensor, y: torch.Tensor | None = None) -> None:
            d__bgto = self._with_heads(layer, gradient)
            if "lora" in layer.methods:
                self._add(layer, "lora", d__bgto, self._with_heads(layer, h))
            if y is not None:
                self._add(layer, "adapter", d__bgto, self._with_heads(layer, y))

        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            self._refuse_second_call(layer)
            saved = (args[0].detach(), output.detach()) if with_adapter else (args[0].detach(),)
            return _Tap.apply(output, self._anchor, record, *saved)

        return hook

    def _tap_attention(self, layer: LayerSpec, query: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Prefix inputs ψ = (1, q/√d_head): the softmax over prefix keys is, to first order, affine in q."""
        self._refuse_second_call(layer)

        def record(gradient__btgo: torch.Tensor, query__bgti: torch.Tensor) -> None:
            scaled = query__bgti * query__bgti.shape[-1] ** -0.5
            psi__bgti = torch.cat([torch.ones_like(scaled[..., :1]), scaled], dim=-1)
            self._add(layer, "prefix", gradient__btgo.transpose(1, 2), psi__bgti)

        return _Tap.apply(output, self._anchor, record, query.detach())

    def _add(self, layer: LayerSpec, method: str, d__bgto: torch.Tensor, z__bgti: torch.Tensor) -> None:
        self.accumulators[layer.name, method].add(d__bgto, z__bgti, self._mask__bt, self._half__b)

    def _with_heads(self, layer: LayerSpec, tensor: torch.Tensor) -> torch.Tensor:
        """[b, t, k] -> [b, 1, t, k], after checking that batch and tokens are what the mask says."""
        if tensor.dim() != 3 or tuple(tensor.shape[:2]) != tuple(self._mask__bt.shape):
            raise ProfilingError(
                f"{layer.name}: expected activations of shape [batch, tokens, features] = "
                f"[{self._mask__bt.shape[0]}, {self._mask__bt.shape[1]}, ...], got {list(tensor.shape)}; this layer "
                "cannot be measured sample by sample"
            )
        return tensor.unsqueeze(1)

    def _refuse_second_call(self, layer: LayerSpec) -> None:
        if layer.name in self._called:
            raise ProfilingError(
                f"{layer.name}: called twice in one forward pass; shared modules cannot be measured yet, leave it out"
            )
        self._called.add(layer.name)
