"""The gated prefix: p trained key/value pairs beside an attention block's own (Li & Liang 2021, arXiv:2101.00190)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from layerlens.methods.added_module import AddedModule
from layerlens.methods.method import QUERY, Operation
from layerlens.models import PREFIX, LayerSpec
from layerlens.models.model_spec import ATTENTION

if TYPE_CHECKING:
    import torch


class Prefix(AddedModule):
    """2·p·d_kv parameters and one gate for each attention head, which makes step 0 exact."""

    name, label, plural, unit, letter = PREFIX, "prefix", "prefixes", "pairs", "P"
    style, colours, marker = "yellow", ("#0f7b5f", "#4fd1a5"), "^"
    sizes_key = "prefix_lengths"
    parameter_tensors = 3
    views = 54
    reads = QUERY
    absorbs_input_scale = True  # the keys do

    def takes(self, layer: LayerSpec, module: Any, adapter_sites: str) -> bool:
        return layer.layer_type == ATTENTION

    def trainable_params(self, layer: LayerSpec, size: int) -> int:
        return 2 * size * layer.d_kv + layer.num_heads

    def operations(self, layer: LayerSpec, size: int) -> list[Operation]:
        """q Pkᵀ, softmax, (...) Pv, times tanh(gate), plus the output."""
        width, scores = layer.n_out, layer.num_heads * size
        return [
            Operation(2 * width * size, width + scores, size * layer.d_kv),
            Operation(0, 2 * scores),
            Operation(2 * width * size, scores + width, size * layer.d_kv),
            Operation(0, 2 * width),
            Operation(0, 3 * width),
        ]

    def kept_elements(self, layer: LayerSpec, size: int) -> float:
        """q, its attention weights and its output."""
        return 2 * layer.n_out + 2 * layer.num_heads * size

    def kept_once(self, layer: LayerSpec, size: int) -> float:
        """Keys and values, repeated for every query head, and the gates' values."""
        return 2.0 * layer.n_out * size + layer.num_heads

    def kept_tensors(self, layer: LayerSpec) -> tuple[str, ...]:
        return (QUERY,)

    def passing(self, layer: LayerSpec, size: int) -> tuple[float, float, float]:
        """What it adds and the sum; gradients of the gate's product, of what it is of, and of q, which stays."""
        return 2.0 * layer.n_out, 3.0 * layer.n_out, float(layer.n_out)

    def matrix_shape(self, layer: LayerSpec) -> tuple[int, int, int]:
        width = layer.n_out // max(layer.num_heads, 1)
        return layer.num_heads, width, width + 1

    def gradient_operands(self, d__bgto: Any, z__bgti: Any) -> tuple[Any, Any]:
        """z = ψ = (1, q/√d_head): the softmax over prefix keys is, to first order, affine in q."""
        import torch

        scaled = z__bgti * z__bgti.shape[-1] ** -0.5
        return d__bgto, torch.cat([torch.ones_like(scaled[..., :1]), scaled], dim=-1)

    def directions(self, layer: LayerSpec, size: int) -> int:
        """p pairs have p directions in every head, and the spectrum is that of all heads together."""
        return size * layer.num_heads

    def build(
        self, model: torch.nn.Module, target: torch.nn.Module, layer: str, size: int, seed: int
    ) -> tuple[torch.nn.Module, str]:
        from layerlens.methods.prefix_module import GatedPrefix, attention_config, attention_shape, check_attention

        heads, kv_heads, head_dim = attention_shape(model, target, layer)
        check_attention(attention_config(model, target))
        made = GatedPrefix(heads, kv_heads, head_dim, size, seed)
        return made, f"{heads} heads, {kv_heads} key/value heads of {head_dim}"

    def attach(self, model: torch.nn.Module, target: torch.nn.Module, added: torch.nn.Module) -> None:
        """Put it into the block and let the block's attention function add it."""
        from layerlens.methods.prefix_module import attention_config, route_attention

        self._add_child(target, added)
        route_attention(attention_config(model, target))

    def detach(self, model: torch.nn.Module, target: torch.nn.Module) -> None:
        from layerlens.methods.prefix_module import unroute_attention

        delattr(target, self.child)
        if not self.modules_in(model):
            unroute_attention(model)


METHOD = Prefix()
