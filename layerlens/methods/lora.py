"""LoRA: W + (alpha/r)·B·A on a Linear, Conv1D, Conv2d, Embedding or every expert of a stacked weight, by PEFT.

Hu et al. 2022, arXiv:2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerlens.integrations.peft import base_of
from layerlens.methods.method import INPUT, Operation
from layerlens.methods.peft_method import PeftMethod
from layerlens.models import LORA, Choice, LayerSpec, Option
from layerlens.models.model_spec import CONV, EMBEDDING, EXPERTS, LINEAR

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig


class LoRA(PeftMethod):
    """r(n_in + n_out / groups) parameters, groups of a convolution being 1 in a Linear; B = 0 at the start.

    An Embedding has Wᵀ + (alpha/r)·B·A, n_in being the number of its rows, and A = 0 at the start.

    Experts each have as many. What PEFT adapts by its parameter is formed whole, W + (alpha/r)·B·A, in every call.
    """

    name, label, plural, unit, letter = LORA, "LoRA", "LoRA layers", "rank", "L"
    style, colours, marker = "cyan", ("#0a6ebd", "#58a6ff"), "o"
    sizes_key = "lora_ranks"
    parameter_tensors = 2
    parameter_mark = ".lora_"
    peft_type, peft_config = "LORA", "LoraConfig"

    def takes(self, layer: LayerSpec, module: Any, adapter_sites: str) -> bool:
        return layer.layer_type in (LINEAR, CONV, EXPERTS, EMBEDDING)

    def takes_size(self, layer: LayerSpec, size: int) -> bool:
        """A multiple of a convolution's groups, and no more than the rank that a change of the weight can have."""
        return size % layer.groups == 0 and size <= min(layer.n_in, layer.n_out)

    def why_not_size(self, layer: LayerSpec, size: int) -> str:
        if size > min(layer.n_in, layer.n_out):
            return f"rank {size} is above min(n_in, n_out) = {min(layer.n_in, layer.n_out)}"
        return f"rank {size} is not a multiple of its {layer.groups} groups"

    def trainable_params(self, layer: LayerSpec, size: int) -> int:
        return layer.experts * size * (layer.n_in + layer.n_out // layer.groups)

    def operations(self, layer: LayerSpec, size: int) -> list[Operation]:
        """A x, B (A x), times alpha/r, plus the frozen output; B of a convolution has its groups."""
        if layer.by_parameter:
            return [Operation(0, 0, _formed(layer) * 2 + self.trainable_params(layer, size), 2 * size * _formed(layer))]
        n_in, n_out, in_group = layer.n_in, layer.n_out, size // layer.groups
        if layer.layer_type == EMBEDDING:  # A is looked up
            return [
                Operation(0, 2 * size),
                Operation(2 * size * n_out, size + n_out, size * n_out),
                Operation(0, 2 * n_out),
                Operation(0, 3 * n_out),
            ]
        return [
            Operation(2 * n_in * size, layer.inputs_per_position + size, n_in * size),
            Operation(2 * in_group * n_out, size + n_out, in_group * n_out),
            Operation(0, 2 * n_out),
            Operation(0, 3 * n_out),
        ]

    def kept_elements(self, layer: LayerSpec, size: int) -> float:
        """Its input h (shared by q, k and v where all are adapted, which this counts each time) and A h."""
        if layer.by_parameter:
            return layer.experts_per_token * layer.n_in
        if layer.layer_type == EMBEDDING:
            return size  # the indices are there anyway
        return layer.inputs_per_position + size

    def kept_tensors(self, layer: LayerSpec) -> tuple[str, ...]:
        return () if layer.by_parameter or layer.layer_type == EMBEDDING else (INPUT,)

    def backward(self, layer: LayerSpec, size: int) -> list[Operation]:
        """Gradients of both factors and of what they read; times alpha/r; and what is added to the layer's own."""
        if layer.by_parameter:
            return super().backward(layer, size)
        *steps, scaled, _ = LoRA.operations(self, layer, size)
        if layer.layer_type == EMBEDDING:  # A's gradient is as large as A, and nothing lies below
            table = Operation(0, 2 * size, layer.n_in * size)
            return [table, *steps[1:], *steps[1:], scaled]
        return [*steps, *steps, scaled, Operation(0, 3 * layer.inputs_per_position)]

    def passing(self, layer: LayerSpec, size: int) -> tuple[float, float, float]:
        """B A h and its multiple, or that and the sum; the gradient times alpha/r; and the gradient of h by A."""
        stays = 0.0 if layer.layer_type == EMBEDDING else float(layer.inputs_per_position)
        return 2.0 * layer.n_out, float(layer.n_out + size), stays

    def passing_once(self, layer: LayerSpec, size: int) -> float:
        """ΔW beside W + ΔW."""
        return _formed(layer) if layer.by_parameter else 0.0

    def kept_once(self, layer: LayerSpec, size: int) -> float:
        """W + ΔW, which the gradient of its input needs."""
        return _formed(layer) if layer.by_parameter else 0.0

    def why_not(self, name: str, module: Any) -> str:
        from layerlens.integrations.peft import why_not_adaptable

        return why_not_adaptable(name, module)

    def sizes_in(self, model: torch.nn.Module) -> dict[str, int]:
        from layerlens.integrations.peft import injected_ranks

        return injected_ranks(model, dora=False)

    def params_in(self, model: torch.nn.Module, option: Option) -> tuple[int, str]:
        from layerlens.integrations.peft import lora_module, lora_shape, tensor_shapes

        site = lora_module(model, option)
        n_in, n_out, _ = lora_shape(site)
        count = sum(math.prod(shape) for shape in tensor_shapes(site, option.rank))
        return count, f"LoRA rank {option.rank} on this {n_in} → {n_out} module"

    def config(
        self, choice: Choice, model: torch.nn.Module, *, train_head: bool = True, base: str | None = None
    ) -> PeftConfig:
        from layerlens.integrations.peft import lora_config

        return lora_config(choice, model, train_head=train_head, base=base)

    def tensors(
        self, choice: Choice, model: torch.nn.Module, factors: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        from layerlens.integrations.peft import zero_step_tensors

        return zero_step_tensors(choice, model, factors)

    def why_not_mergeable(self, model: torch.nn.Module) -> str:
        for name, module in base_of(model).named_modules():
            if getattr(module, "groups", 1) > 1 and name.endswith(".base_layer"):
                return (
                    f"{name.removesuffix('.base_layer')} is a convolution of {module.groups} groups, whose LoRA PEFT "
                    "cannot add to the weight"
                )
        return super().why_not_mergeable(model)


def _formed(layer: LayerSpec) -> int:
    """Elements of its weight, of all experts."""
    return layer.experts * layer.n_in * layer.n_out


METHOD = LoRA()
