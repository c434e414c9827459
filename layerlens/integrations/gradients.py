"""What single layers get and what the loss wants of them, over some batches: inputs' covariances and gradients.

Initialisations of LoRA (``tuning.initialization``) and published rank rules (EVA, GoRA) begin from these two matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ManifestError
from layerlens.integrations.quantized import device_of, is_quantized
from layerlens.integrations.torch_modules import find_module, first_input, frozen_without_dropout

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CalibrationBatch:
    """One batch to measure on.

    Args:
        inputs: keyword arguments of the model. A row of ``attention_mask`` that is 0 is padding and is left out.
        loss: from the model's output to the sum of the samples' losses; None takes the model's own loss.
    """

    inputs: Mapping[str, Any]
    loss: Callable[[Any], torch.Tensor] | None = None


@dataclass(frozen=True)
class LayerMoments:
    """What was measured of one layer, float64; None where it was not asked for.

    Args:
        covariance: [n_in, n_in], of the layer's inputs around their mean; of a convolution its patches.
        gradient: [n_out, n_in], of the summed loss of all batches with respect to the layer's weight.
    """

    covariance: torch.Tensor | None
    gradient: torch.Tensor | None


def layer_moments(
    model: torch.nn.Module,
    layers: Iterable[str],
    batches: Iterable[CalibrationBatch],
    *,
    covariances: bool = False,
    gradients: bool = False,
) -> dict[str, LayerMoments]:
    """The moments of ``layers``, in evaluation mode; the model is left as it was.

    Args:
        model: without LoRA.
        layers: names of Linear, Conv1D or convolution modules.
        batches: gone through once.
        covariances, gradients: what is measured.

    Raises:
        ManifestError: a layer that no batch reached, or no loss for the gradients.
    """
    import torch

    modules: dict[str, Any] = {name: find_module(model, name) for name in layers}
    inputs = {name: _InputSums() for name in modules} if covariances else {}
    sums: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(frozen_without_dropout(model))
        stack.enter_context(nullcontext() if gradients else torch.no_grad())
        for name, seen in inputs.items():
            stack.callback(modules[name].register_forward_pre_hook(seen, with_kwargs=True).remove)
        weights = [stack.enter_context(_weight(module, gradients)) for module in modules.values()]
        for batch in batches:
            for seen in inputs.values():
                seen.mask = batch.inputs.get("attention_mask")
            output = model(**batch.inputs)
            if gradients:
                loss = output.loss if batch.loss is None else batch.loss(output)
                if loss is None:
                    raise ManifestError("a gradient needs labels in the batches, or their loss")
                _add(sums, modules, torch.autograd.grad(loss, weights, allow_unused=True))
    for name in modules:
        if (covariances and not inputs[name].count) or (gradients and name not in sums):
            raise ManifestError(f"{name}: no batch reached this layer")
    return {
        name: LayerMoments(
            inputs[name].covariance() if covariances else None,
            _as_matrix(module, sums[name]) if gradients else None,
        )
        for name, module in modules.items()
    }


@contextmanager
def _weight(module: Any, gradients: bool) -> Iterator[torch.Tensor]:
    """What the layer's gradient is taken of: its weight, or if that is quantized a zero that is added to it."""
    import torch

    if not is_quantized(module):
        yield module.weight.requires_grad_(gradients)
        return
    change = torch.zeros(module.out_features, module.in_features, device=device_of(module), requires_grad=gradients)

    def add(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        return output + torch.nn.functional.linear(first_input(args, kwargs).float(), change).to(output.dtype)

    handle = module.register_forward_hook(add, with_kwargs=True)
    try:
        yield change
    finally:
        handle.remove()


class _InputSums:
    """A forward pre-hook that adds up a layer's inputs, padding left out."""

    def __init__(self) -> None:
        self.mask: torch.Tensor | None = None
        self.gram: torch.Tensor | float = 0.0
        self.total: torch.Tensor | float = 0.0
        self.count = 0

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = _input_rows(module, first_input(args, kwargs).detach(), self.mask).float()
        self.gram = self.gram + rows.T @ rows
        self.total = self.total + rows.sum(0)
        self.count += len(rows)

    def covariance(self) -> torch.Tensor:
        import torch

        gram, total = torch.as_tensor(self.gram).double(), torch.as_tensor(self.total).double()
        return gram / self.count - torch.outer(total / self.count, total / self.count)


def _add(sums: dict[str, torch.Tensor], names: Iterable[str], gradients: Iterable[torch.Tensor | None]) -> None:
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is not None:
            sums[name] = sums[name] + gradient.float() if name in sums else gradient.float()


def _input_rows(module: Any, inputs: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Inputs as rows [n, n_in], padding left out; patches of a convolution."""
    from layerlens.integrations.weight_matrices import conv_patches

    if hasattr(module, "kernel_size"):
        return conv_patches(module, inputs).flatten(0, 2)
    if mask is not None and inputs.shape[:-1] == mask.shape:
        return inputs[mask.bool()]
    return inputs.flatten(0, -2)


def _as_matrix(module: Any, gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.T if hasattr(module, "nx") else gradient  # transformers' Conv1D is stored transposed
    return gradient.flatten(1).double()
