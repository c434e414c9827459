"""Which modules are norms whose parameters act feature by feature: LayerNorm, RMSNorm and their kin."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch

from layerlens.integrations.transformers import task_heads
from layerlens.models import LayerSpec
from layerlens.models.model_spec import NORM
from layerlens.registry import METHODS

OTHER_NORMS = (
    torch.nn.modules.batchnorm._BatchNorm, torch.nn.GroupNorm, torch.nn.LocalResponseNorm, torch.nn.CrossMapLRN2d,
)  # fmt: skip
"""Norms over channels, which come first, or over batches."""


def is_norm(module: Any) -> bool:
    """Whether ``module`` computes one input to an output of its shape, with vectors of its last axis' width."""
    parameters = list(module.parameters())
    named = "norm" in type(module).__name__.lower() and not type(module).__name__.endswith("2d")
    if not named or not parameters or isinstance(module, OTHER_NORMS) or any(True for _ in module.children()):
        return False
    if getattr(module, "data_format", "channels_last") != "channels_last":
        return False
    widths = {tuple(parameter.shape) for parameter in parameters}
    return len(widths) == 1 and len(next(iter(widths))) == 1 and len(inspect.signature(module.forward).parameters) == 1


def norm_layers(
    model: torch.nn.Module, modules: Mapping[str, torch.nn.Module], blocks: tuple[str, ...], methods: Collection[str]
) -> dict[str, int | None]:
    """Path -> block of every norm outside the task head; none where no method on offer takes one."""
    takes = [METHODS[name] for name in methods if name in METHODS]
    if not any(method.takes(LayerSpec("norm", 1, NORM), None, "residual") for method in takes):
        return {}
    heads = task_heads(model)
    found: dict[str, int | None] = {}
    for path, module in modules.items():
        inside_head = any(path == head or path.startswith(f"{head}.") for head in heads)
        if is_norm(module) and not inside_head:
            found[path] = next((i for i, block in enumerate(blocks) if path.startswith(f"{block}.")), None)
    return found


def norm_layer(
    path: str, module: Any, block: int | None, places: tuple[int, int] | None, config: Any = None
) -> LayerSpec:
    """A norm as a layer: n_in features, n_out parameters; num_heads where it is called on heads, which are narrower."""
    sizes = [parameter.numel() for parameter in module.parameters()]
    positions, elements = places or (0, 0)
    narrow = sizes[0] < (getattr(config, "hidden_size", None) or 0)
    heads = int(getattr(config, "num_attention_heads", None) or 1) if narrow else 1
    return LayerSpec(
        name=path, hidden_size=sizes[0], layer_type=NORM, n_in=sizes[0], n_out=sum(sizes), block=block,
        positions=positions, input_elements=elements, num_heads=heads,
    )  # fmt: skip
