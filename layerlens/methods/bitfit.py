"""BitFit: a trained bias (Ben Zaken et al. 2022, arXiv:2106.10199), by Hugging Face PEFT's BEFT (arXiv:2509.15974).

PEFT adds a vector, 0 at the start, to the output of a Linear, which moves its bias where it has one, and gives it one
where it has none. (A LoraConfig's ``bias`` trains the biases of all layers or of none.) Its gradient is Σ_t d_t.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from layerlens.integrations.peft import base_of
from layerlens.methods.method import Operation, sums_over_tokens
from layerlens.methods.peft_method import VectorMethod
from layerlens.models import LayerSpec
from layerlens.models.model_spec import LINEAR

if TYPE_CHECKING:
    import torch


class BitFit(VectorMethod):
    """n_out parameters, all 0 at the start."""

    name, label, plural, unit, letter = "bitfit", "BitFit", "BitFit layers", "vector", "B"
    style, colours, marker = "red", ("#cf222e", "#ff7b72"), "X"
    parameter_mark, holder = ".beft_bias.", "beft_bias"
    peft_type, peft_config = "BEFT", "BeftConfig"
    on_request = True

    def takes(self, layer: LayerSpec, module: Any, adapter_sites: str) -> bool:
        return layer.layer_type == LINEAR and not self.why_not(layer.name, module)

    def trainable_params(self, layer: LayerSpec, size: int) -> int:
        return layer.n_out

    def operations(self, layer: LayerSpec, size: int) -> list[Operation]:
        """One sum of elements."""
        return [Operation(0, 2 * layer.n_out, layer.n_out)]

    def kept_elements(self, layer: LayerSpec, size: int) -> float:
        """Nothing: the gradient of a sum needs no activation."""
        return 0.0

    def passing(self, layer: LayerSpec, size: int) -> tuple[float, float, float]:
        """Nothing: the trained bias takes the place of the layer's own."""
        return 0.0, 0.0, 0.0

    def layer_operands(self, layer: LayerSpec, module: Any, d__bgto: Any, h__bgti: Any, y: Any) -> tuple[Any, Any]:
        """d, added up over the tokens."""
        return sums_over_tokens(d__bgto)

    def why_not(self, name: str, module: Any) -> str:
        import torch

        if isinstance(module, torch.nn.Linear):
            return ""
        return f"PEFT's BEFT goes on a Linear, this is a {type(module).__name__}"

    def layer_tensors(self, name: str, module: Any) -> dict[str, torch.Tensor]:
        import torch

        return {"beft_bias": torch.zeros(1, module.out_features)}

    def why_not_mergeable(self, model: torch.nn.Module) -> str:
        base: Any = base_of(model)
        for name in self.sizes_in(model):
            if base.get_submodule(name).get_base_layer().bias is None:
                return f"{name} has no bias in the base model, so the trained bias cannot be merged"
        return ""


METHOD = BitFit()
