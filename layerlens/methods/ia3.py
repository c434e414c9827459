"""(IA)³: a trained factor for each feature of a layer (Liu et al. 2022, arXiv:2205.05638), by Hugging Face PEFT.

The factors multiply the layer's output, bias included; of a feed-forward's second matrix (role ``ffn_down``) its input,
as in the paper. They are 1 at the start. Their gradients are Σ_t d_to y_to, and Σ_t (Wᵀ d_t)_i h_ti.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from layerlens.integrations.transformers import role_of
from layerlens.methods.method import INPUT, OUTPUT, Operation, sums_over_tokens
from layerlens.methods.peft_method import VectorMethod
from layerlens.models import LayerSpec

if TYPE_CHECKING:
    import torch


def scales_input(name: str) -> bool:
    """Whether the factors of the layer ``name`` multiply its input."""
    return role_of(name) == "ffn_down"


class IA3(VectorMethod):
    """n_out parameters (n_in where the input is scaled), all 1 at the start."""

    name, label, plural, unit, letter = "ia3", "IA3", "IA3 layers", "vector", "I"
    style, colours, marker = "green", ("#1a7f37", "#56d364"), "P"
    parameter_mark, holder = ".ia3_l.", "ia3_l"
    peft_type, peft_config = "IA3", "IA3Config"
    reads = OUTPUT
    on_request = True

    def why_refused(self, layer: LayerSpec, module: Any) -> str:
        from layerlens.integrations.peft_refusals import refused_kind

        return refused_kind(module, self.peft_config, feedforward_modules=[])

    def trainable_params(self, layer: LayerSpec, size: int) -> int:
        return layer.n_in if scales_input(layer.name) else layer.n_out

    def operations(self, layer: LayerSpec, size: int) -> list[Operation]:
        """One product of elements."""
        width = self.trainable_params(layer, size)
        return [Operation(0, 2 * width, width)]

    def kept_elements(self, layer: LayerSpec, size: int) -> float:
        """What is scaled."""
        return self.trainable_params(layer, size)

    def kept_tensors(self, layer: LayerSpec) -> tuple[str, ...]:
        return (INPUT,) if scales_input(layer.name) else (OUTPUT,)

    def passing(self, layer: LayerSpec, size: int) -> tuple[float, float, float]:
        """What is scaled, scaled; the product that the factors' gradient is the sum of, and the scaled gradient.

        Beside these, where the input is scaled, the gradient that arrives there.
        """
        width = float(self.trainable_params(layer, size))
        return width, (3.0 if scales_input(layer.name) else 2.0) * width, 0.0

    def kept_once(self, layer: LayerSpec, size: int) -> float:
        """The factors, which PEFT copies."""
        return self.trainable_params(layer, size)

    def layer_operands(self, layer: LayerSpec, module: Any, d__bgto: Any, h__bgti: Any, y: Any) -> tuple[Any, Any]:
        """d ∘ y, or Wᵀ d ∘ h, added up over the tokens."""
        if not scales_input(layer.name):
            return sums_over_tokens(d__bgto, y)
        return sums_over_tokens(_input_gradient(module, d__bgto, h__bgti), h__bgti)

    def why_not(self, name: str, module: Any) -> str:
        from layerlens.integrations.transformers import is_dense

        return "" if is_dense(module) else f"IA3 goes on a Linear or Conv1D, this is a {type(module).__name__}"

    def layer_tensors(self, name: str, module: Any) -> dict[str, torch.Tensor]:
        import torch

        from layerlens.integrations.transformers import dense_shape

        n_in, n_out = dense_shape(module)
        return {"ia3_l": torch.ones(1, n_in) if scales_input(name) else torch.ones(n_out, 1)}

    def own_fields(self, model: torch.nn.Module, names: list[str]) -> dict[str, Any]:
        scaled = sorted(name for name in names if scales_input(name))
        return {
            "feedforward_modules": "|".join(map(re.escape, scaled)) if scaled else [],
            "fan_in_fan_out": any(hasattr(model.get_submodule(name), "nf") for name in names),  # Conv1D
        }


def _input_gradient(module: Any, d__bgto: Any, h__bgti: Any) -> Any:
    """Wᵀ d through the module's own backward pass, whatever its weight is stored as."""
    import torch

    with torch.enable_grad():
        h = h__bgti.expand(len(d__bgto), *h__bgti.shape[1:]).detach().requires_grad_(True)
        output = module.forward(h.flatten(0, 1))  # past its hooks; 8-bit kernels take no more axes
        (gradient,) = torch.autograd.grad(output, h, d__bgto.flatten(0, 1).to(output.dtype))
    return gradient


METHOD = IA3()
