"""LoRA: W + (alpha/r)·B·A on a Linear, Conv1D or Conv2d (Hu et al. 2022, arXiv:2106.09685), by Hugging Face PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ManifestError
from layerlens.integrations.peft import base_of
from layerlens.methods.method import Method, Operation
from layerlens.models import LORA, Choice, LayerSpec, Option
from layerlens.models.model_spec import CONV, LINEAR

if TYPE_CHECKING:
    import torch


class LoRA(Method):
    """r(n_in + n_out / groups) parameters, groups of a convolution being 1 in a Linear; B = 0 at the start."""

    name, label, plural, unit, letter = LORA, "LoRA", "LoRA layers", "rank", "L"
    style, colours, marker = "cyan", ("#0a6ebd", "#58a6ff"), "o"
    sizes_key = "lora_ranks"
    parameter_mark = ".lora_"
    wraps = mergeable = True

    def takes(self, layer: LayerSpec, module: Any, adapter_sites: str) -> bool:
        return layer.layer_type in (LINEAR, CONV)

    def takes_size(self, layer: LayerSpec, size: int) -> bool:
        return size % layer.groups == 0

    def trainable_params(self, layer: LayerSpec, size: int) -> int:
        return size * (layer.n_in + layer.n_out // layer.groups)

    def operations(self, layer: LayerSpec, size: int) -> list[Operation]:
        """A x, B (A x), times alpha/r, plus the frozen output; B of a convolution has its groups."""
        n_in, n_out, in_group = layer.n_in, layer.n_out, size // layer.groups
        return [
            Operation(2 * n_in * size, layer.inputs_per_position + size, n_in * size),
            Operation(2 * in_group * n_out, size + n_out, in_group * n_out),
            Operation(0, 2 * n_out),
            Operation(0, 3 * n_out),
        ]

    def kept_elements(self, layer: LayerSpec, size: int) -> float:
        """Its input h (shared by q, k and v where all are adapted, which this counts each time) and A h."""
        return layer.inputs_per_position + size

    def params_in(self, model: torch.nn.Module, option: Option) -> tuple[int, str]:
        from layerlens.integrations.peft import lora_module, lora_shape

        n_in, n_out, groups = lora_shape(lora_module(model, option))
        return option.rank * (n_in + n_out // groups), f"LoRA rank {option.rank} on this {n_in} → {n_out} module"

    def prepare(
        self, model: torch.nn.Module, choice: Choice, factors: Mapping[str, torch.Tensor] | None = None
    ) -> Callable[[torch.nn.Module], torch.nn.Module]:
        from layerlens.integrations.peft import lora_config, zero_step_tensors

        tensors = zero_step_tensors(choice, model, factors)
        config = lora_config(choice, model)
        config.base_model_name_or_path = None  # PEFT fills in where this very model came from
        return lambda frozen: _wrapped(frozen, config, choice.lora_ranks(), tensors)

    def sizes_in(self, model: torch.nn.Module) -> dict[str, int]:
        from layerlens.integrations.peft import injected_ranks

        return injected_ranks(model)

    def remove(self, model: torch.nn.Module) -> None:
        base = base_of(model)
        if base is not model:
            _unload(model, base)

    def why_not_mergeable(self, model: torch.nn.Module) -> str:
        for name, module in base_of(model).named_modules():
            if getattr(module, "groups", 1) > 1 and name.endswith(".base_layer"):
                return (
                    f"{name.removesuffix('.base_layer')} is a convolution of {module.groups} groups, whose LoRA PEFT "
                    "cannot add to the weight"
                )
        return ""

    def merge(self, model: torch.nn.Module) -> torch.nn.Module:
        """W + (alpha/r)·B·A in the precision of W, and the trained task head in place."""
        tuned: Any = model
        merged: torch.nn.Module = tuned.merge_and_unload()
        return merged


def _wrapped(
    model: torch.nn.Module, config: Any, ranks: Mapping[str, int], tensors: Mapping[str, torch.Tensor]
) -> torch.nn.Module:
    """A PEFT model around ``model`` whose LoRA has these ranks and starts from ``tensors``."""
    import torch
    from peft import get_peft_model

    from layerlens.integrations.peft import injected_ranks

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT 0.21 still reads a name of gradient checkpointing that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        tuned = get_peft_model(model, config)  # draws weights of its own, which are replaced below
    if injected_ranks(tuned) != ranks:
        missed = sorted(ranks.keys() - injected_ranks(tuned).keys()) or sorted(ranks)
        raise ManifestError(
            f"PEFT did not give these layers their rank: {', '.join(missed)}; are they in the task head?"
        )
    layers = dict(tuned.named_modules())
    with torch.no_grad():
        for key, tensor in tensors.items():
            layer, _, part = key.removesuffix(".weight").rpartition(".")
            getattr(layers[layer], part)["default"].weight.copy_(tensor)
    return tuned


def _unload(model: Any, base: torch.nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise ManifestError(
                f"{name}: LoRA is merged into the weight, and taking it out again would leave rounding errors; load "
                "the base model again"
            )
    originals = {
        name: module.original_module
        for name, module in base.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    model.unload()
    for name, original in originals.items():
        base.set_submodule(name, original)


METHOD = LoRA()
