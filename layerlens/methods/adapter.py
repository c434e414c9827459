"""The serial bottleneck adapter: y + U·GELU(D·y + b) + c behind a layer (Houlsby et al. 2019, arXiv:1902.00751)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ManifestError
from layerlens.methods.added_module import AddedModule
from layerlens.methods.method import OUTPUT, Operation
from layerlens.models import ADAPTER, LayerSpec
from layerlens.models.model_spec import LINEAR

if TYPE_CHECKING:
    import torch


class Adapter(AddedModule):
    """2·n_out·k + k + n_out parameters for a width of k; U = 0, b = c = 0 at the start."""

    name, label, plural, unit, letter = ADAPTER, "adapter", "adapters", "width", "A"
    style, colours, marker = "magenta", ("#c2410c", "#ff9b57"), "s"
    sizes_key = "adapter_sizes"
    parameter_tensors = 4
    reads = OUTPUT
    absorbs_input_scale = True  # D does

    def takes(self, layer: LayerSpec, module: Any, adapter_sites: str) -> bool:
        return layer.layer_type == LINEAR and (layer.writes_residual or adapter_sites == "all")

    def trainable_params(self, layer: LayerSpec, size: int) -> int:
        return 2 * layer.n_out * size + size + layer.n_out

    def operations(self, layer: LayerSpec, size: int) -> list[Operation]:
        """D y + b, GELU, U (...) + c, plus y."""
        n_out = layer.n_out
        return [
            Operation(2 * n_out * size, n_out + size, n_out * size + size),
            Operation(0, 2 * size),
            Operation(2 * size * n_out, size + n_out, size * n_out + n_out),
            Operation(0, 3 * n_out),
        ]

    def kept_elements(self, layer: LayerSpec, size: int) -> float:
        """y and both sides of its activation."""
        return layer.n_out + 2 * size

    def kept_tensors(self, layer: LayerSpec) -> tuple[str, ...]:
        return (OUTPUT,)

    def passing(self, layer: LayerSpec, size: int) -> tuple[float, float, float]:
        """What it adds and the sum; the gradient of y, which the layer's own backward pass then begins with."""
        return 2.0 * layer.n_out, float(layer.n_out), 0.0

    def build(
        self, model: torch.nn.Module, target: torch.nn.Module, layer: str, size: int, seed: int
    ) -> tuple[torch.nn.Module, str]:
        from layerlens.integrations.transformers import dense_shape, is_dense
        from layerlens.methods.adapter_module import BottleneckAdapter

        if not is_dense(target):
            raise ManifestError(f"{layer}: an adapter follows a Linear or Conv1D, this is a {type(target).__name__}")
        width = dense_shape(target)[1]
        return BottleneckAdapter(width, size, seed), f"output width {width}"


METHOD = Adapter()
