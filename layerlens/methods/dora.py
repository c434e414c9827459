"""DoRA: m ∘ (W + (alpha/r)·B·A) / ‖·‖, LoRA with trained row norms (Liu et al. 2024, arXiv:2402.09353), by PEFT.

PEFT has one ``use_dora`` for a whole adapter, so a choice has DoRA or LoRA, not both. The norm in the denominator is
taken for a constant (section 4.3 of the paper), so at the start, where B = 0 and m = ‖w‖, B has LoRA's gradient, and
m_o has Σ_t d_to (y_to − b_o) / ‖w_o‖: the part of LoRA's gradient matrix M along the unit row of W.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from layerlens.methods.lora import LoRA
from layerlens.methods.method import OUTPUT, Operation, sums_over_tokens
from layerlens.models import DORA, LORA, LayerSpec, MethodStatistics, Option
from layerlens.models.model_spec import LINEAR

if TYPE_CHECKING:
    import torch

ALPHA_OVER_R = 2.0
"""The default of ``optimization.alpha_over_r``, at which the gradients of m and of B are compared."""


class DoRA(LoRA):
    """r(n_in + n_out) + n_out parameters; B = 0 and m = ‖w‖ at the start.

    What is measured for it is the gradient of m, a vector; that of B is LoRA's, which the layer has too.
    """

    name, label, plural, unit, letter = DORA, "DoRA", "DoRA layers", "rank", "D"
    style, colours, marker = "blue", ("#8250df", "#d2a8ff"), "v"
    reads = OUTPUT
    parameter_tensors = 3
    on_request = starts_from_weights = True

    def takes(self, layer: LayerSpec, module: Any, adapter_sites: str) -> bool:
        return layer.layer_type == LINEAR and not layer.by_parameter

    def why_refused(self, layer: LayerSpec, module: Any) -> str:
        from layerlens.integrations.peft_refusals import refused_kind

        weight: Any = getattr(module, "weight", None)
        if type(weight).__name__ == "Int8Params" and weight.device.type == "cpu":
            return (
                "PEFT loses the scales of bitsandbytes' 8-bit weights when it unpacks them on a CPU, and DoRA's "
                "norms need them"
            )
        return refused_kind(module, "LoraConfig", use_dora=True, r=1)

    def trainable_params(self, layer: LayerSpec, size: int) -> int:
        return super().trainable_params(layer, size) + layer.n_out

    def operations(self, layer: LayerSpec, size: int) -> list[Operation]:
        """B·A of an identity, the norms of W + (alpha/r)·B·A, LoRA's own, and (m/‖·‖ − 1)(y − b) + m/‖·‖ · (...)."""
        n_in, n_out = layer.n_in, layer.n_out
        return [
            Operation(0, 0, n_in * n_in + 2 * size * n_in, call_flops=2.0 * n_in * n_in * size),
            Operation(0, 0, n_in * (size + n_out) + size * n_out, call_flops=2.0 * n_in * size * n_out),
            Operation(0, 0, 3 * n_in * n_out),
            Operation(0, 0, 3 * n_in * n_out),
            Operation(0, 0, n_in * n_out + 4 * n_out),
            *super().operations(layer, size),
            *(Operation(0, 2 * n_out, n_out) for _ in range(3)),
            Operation(0, 3 * n_out),
        ]

    def backward(self, layer: LayerSpec, size: int) -> list[Operation]:
        """LoRA's, and that of the last four: norms and what they are of are constants."""
        return [*super().backward(layer, size), *self.operations(layer, size)[-4:]]

    def kept_elements(self, layer: LayerSpec, size: int) -> float:
        """LoRA's, y − b and B A h, which the gradient of m needs."""
        return super().kept_elements(layer, size) + 2 * layer.n_out

    def kept_once(self, layer: LayerSpec, size: int) -> float:
        """m/‖·‖ with one taken off and without, and ‖·‖."""
        return 3 * layer.n_out

    def passing(self, layer: LayerSpec, size: int) -> tuple[float, float, float]:
        """LoRA's; and the multiples of y and of B A h with their sum, and the gradients of both."""
        forwards, backwards, stays = super().passing(layer, size)
        return forwards + 2.0 * layer.n_out, backwards + 2.0 * layer.n_out, stays

    def passing_once(self, layer: LayerSpec, size: int) -> float:
        """An identity, B A of it, its multiple, and the sum with W, of which the norms are taken."""
        return layer.n_in * layer.n_in + 3 * layer.n_in * layer.n_out

    def matrix_shape(self, layer: LayerSpec) -> tuple[int, int, int]:
        return 1, layer.n_out, 1

    def layer_operands(self, layer: LayerSpec, module: Any, d__bgto: Any, h__bgti: Any, y: Any) -> tuple[Any, Any]:
        """d ∘ (y − b) / ‖w‖, added up over the tokens."""
        from layerlens.integrations.peft import row_norms

        norms = row_norms(module).to(d__bgto.device)
        bias = getattr(module, "bias", None)
        products = y if bias is None else y - bias.detach()
        tiny = float(np.finfo(np.float32).tiny)  # a row of zeros has no direction, and no gradient
        return sums_over_tokens(d__bgto, products / norms.clamp_min(tiny))

    def energy(self, layer: LayerSpec, size: int, measured: Mapping[str, MethodStatistics], name: str) -> float:
        """‖M‖² of LoRA + ‖∂L/∂m‖² · 3 n_in/(alpha/r)² / rank: m's gradient in the units of B's (see ``Method``)."""
        of_b, of_m = getattr(measured[LORA], name), getattr(measured[self.name], name)
        return float(of_b + of_m * 3.0 * layer.n_in / ALPHA_OVER_R**2 / size)

    def whitened_values(self, layer: LayerSpec, size: int, measured: Mapping[str, MethodStatistics]) -> Any:
        """LoRA's up to the rank, and that of m."""
        return np.concatenate([measured[LORA].spectrum[:size], measured[self.name].spectrum[:1]])

    def params_in(self, model: torch.nn.Module, option: Option) -> tuple[int, str]:
        from layerlens.integrations.peft import lora_module, lora_shape

        n_in, n_out, _ = lora_shape(lora_module(model, option))
        return option.rank * (n_in + n_out) + n_out, f"DoRA rank {option.rank} on this {n_in} → {n_out} module"

    def sizes_in(self, model: torch.nn.Module) -> dict[str, int]:
        from layerlens.integrations.peft import injected_ranks

        return injected_ranks(model, dora=True)


METHOD = DoRA()
