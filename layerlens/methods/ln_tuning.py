"""LayerNorm tuning: the weight and bias of a norm (Zhao et al. 2023, arXiv:2312.11420), by Hugging Face PEFT.

PEFT trains a copy of the norm, which computes what the norm does: beside another of its methods as one of that one's
``modules_to_save``. Its layers are norms (LayerNorm, RMSNorm and their
kin), which no other method takes. A norm is affine in each of its parameters, feature by feature, so its own forward
pass gives the factor u of each: f(x; 1) − f(x; 0); the gradient of the parameter is Σ_t d_t ∘ u_t.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from layerlens.integrations.peft import base_of
from layerlens.methods.method import INPUT, Operation, sums_over_tokens
from layerlens.methods.peft_method import VectorMethod
from layerlens.models import LayerSpec
from layerlens.models.model_spec import NORM

if TYPE_CHECKING:
    import torch


class LNTuning(VectorMethod):
    """As many parameters as the norm has, which begin as the norm's."""

    name, label, plural, unit, letter = "ln_tuning", "LN tuning", "tuned norms", "norm", "N"
    style, colours, marker = "bright_black", ("#57606a", "#8b949e"), "h"
    parameter_mark, holder = ".ln_tuning_layers.", "ln_tuning_layers"
    peft_type, peft_config = "LN_TUNING", "LNTuningConfig"
    on_request = starts_from_weights = joins = True

    def takes(self, layer: LayerSpec, module: Any, adapter_sites: str) -> bool:
        return layer.layer_type == NORM

    def trainable_params(self, layer: LayerSpec, size: int) -> int:
        return layer.n_out

    def operations(self, layer: LayerSpec, size: int) -> list[Operation]:
        """None: the copy runs in the norm's place."""
        return []

    def kept_elements(self, layer: LayerSpec, size: int) -> float:
        """What it normalises, with mean and deviation; a norm of heads has one of each."""
        return (layer.n_in + 2) * layer.num_heads

    def kept_tensors(self, layer: LayerSpec) -> tuple[str, ...]:
        """Its input by torch's kernel; a norm without a bias is written out, and keeps the normalised input."""
        return (INPUT,) if layer.n_out > layer.n_in else ()

    def tensor_elements(self, layer: LayerSpec, tensor: str) -> float:
        return layer.n_in * layer.num_heads

    def passing(self, layer: LayerSpec, size: int) -> tuple[float, float, float]:
        """The product that the gradient is the sum of, and the scaled gradient, where no kernel does both."""
        return 0.0, 2.0 * layer.n_in * layer.num_heads, 0.0

    def layer_operands(self, layer: LayerSpec, module: Any, d__bgto: Any, h__bgti: Any, y: Any) -> tuple[Any, Any]:
        """d ∘ u of every parameter, one behind the other, added up over the tokens."""
        import torch

        factors = parameter_factors(module, h__bgti)
        return sums_over_tokens(torch.cat([d__bgto] * len(factors), dim=-1), torch.cat(factors, dim=-1))

    def why_not(self, name: str, module: Any) -> str:
        from layerlens.integrations.norms import is_norm

        return "" if is_norm(module) else f"LN tuning goes on a LayerNorm or RMSNorm, this is a {type(module).__name__}"

    def sizes_in(self, model: torch.nn.Module) -> dict[str, int]:
        """Also of norms that are trained beside another method."""
        from peft.utils.other import ModulesToSaveWrapper

        from layerlens.integrations.norms import is_norm

        copies = {name: x for name, x in base_of(model).named_modules() if isinstance(x, ModulesToSaveWrapper)}
        beside = {name: 1 for name, x in copies.items() if x.active_adapters and is_norm(x.original_module)}
        return super().sizes_in(model) | beside

    def layer_tensors(self, name: str, module: Any) -> dict[str, torch.Tensor]:
        tensors = {end: parameter.detach().clone() for end, parameter in module.named_parameters()}
        return {f"{self.holder}.{end}": tensor for end, tensor in tensors.items()}


def parameter_factors(module: torch.nn.Module, h: torch.Tensor) -> list[torch.Tensor]:
    """f(h; p = 1) − f(h; p = 0), the other parameters 0, of each parameter p of a norm, at least in float32."""
    import torch

    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    names = [name for name, _ in module.named_parameters()]
    zeros = {name: wide.new_zeros(wide.shape[-1]) for name in names}

    def computed(values: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad(), torch.nn.utils.stateless._reparametrize_module(module, values):
            found: torch.Tensor = module.forward(wide)
            return found

    nothing = computed(zeros)
    return [computed({**zeros, name: torch.ones_like(zeros[name])}) - nothing for name in names]


METHOD = LNTuning()
