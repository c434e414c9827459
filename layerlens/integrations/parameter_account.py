"""Every parameter of a model accounted for exactly once: offered, trained as the head, or left out with a reason."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch

from layerlens.integrations.norms import is_norm
from layerlens.integrations.quantized import is_quantized, quantized_layers, weight_count, weight_in_buffers
from layerlens.integrations.transformers import blocks_of, is_dense, task_heads
from layerlens.integrations.weight_matrices import is_convolution
from layerlens.models import ModelSpec
from layerlens.models.model_spec import ATTENTION, EXPERTS

OFFERED, HEAD = "offered", "head"
EMBEDDING = "an embedding: its rows are looked up, not multiplied"
NORM = "a norm, of vectors, not matrices"
OUTSIDE = "outside the model's blocks; profiling.layers can name it"
FROZEN_HEAD = "the model's own head, which stays unchanged"
NO_METHOD = "none of the measured methods can adapt it"
CHANNELS = (torch.nn.modules.batchnorm._BatchNorm, torch.nn.GroupNorm)


def account_of(model: torch.nn.Module, spec: ModelSpec, heads: Collection[str] = ()) -> dict[str, Any]:
    """The sums of ``parameters_of``: "offered", "head", and "left_out" by reason; together the model's parameters."""
    sums = {OFFERED: 0, HEAD: 0}
    left_out: dict[str, int] = {}
    for _, n, status in parameters_of(model, spec, heads):
        into = sums if status in sums else left_out
        into[status] = into.get(status, 0) + n
    return {**sums, "left_out": left_out}


def parameters_of(
    model: torch.nn.Module, spec: ModelSpec, heads: Collection[str] = ()
) -> Iterator[tuple[str, int, str]]:
    """(name, how many numbers, ``OFFERED``, ``HEAD`` or the reason why it is left out) of every parameter.

    One that several modules share is there once, under its first name; it is offered where any of its names is.

    Args:
        model: the model.
        spec: the layers that are offered, and those left out with their reasons.
        heads: modules that are trained in full, or parameters in them.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    offered = {layer.name for layer in spec.layers if layer.layer_type != ATTENTION}
    stacked = {layer.name for layer in spec.layers if layer.layer_type == EXPERTS}
    blocks, own_heads = blocks_of(model), task_heads(model)
    for all_names in names.values():
        for name in all_names:
            path, _, part = name.rpartition(".")
            if _within(name, heads):
                status = HEAD
            elif name in stacked or (path in offered and path not in stacked):
                status = OFFERED
            else:
                continue
            break
        else:
            name = all_names[0]
            status = _reason(model, name, spec, blocks, own_heads)
        path, _, part = name.rpartition(".")
        yield all_names[0], weight_count(model.get_submodule(path), part), status
    for path, module in quantized_layers(model).items():
        if weight_in_buffers(module):
            size = int(module.in_features) * int(module.out_features)  # type: ignore[arg-type]
            status = OFFERED if path in offered else HEAD if _within(path, heads) else ""
            yield f"{path}.weight", size, status or _reason(model, f"{path}.weight", spec, blocks, own_heads)


def _reason(model: torch.nn.Module, name: str, spec: ModelSpec, blocks: Collection[str], heads: Collection[str]) -> str:
    path, _, part = name.rpartition(".")
    module: Any = model.get_submodule(path)
    around = [name]
    while around[-1]:
        around.append(around[-1].rpartition(".")[0])
    known = next((spec.left_out[one] for one in around if one in spec.left_out), "")
    if known:
        return known
    if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)):
        return EMBEDDING
    if isinstance(module, CHANNELS) or is_norm(module) or "norm" in type(module).__name__.lower():
        return NORM
    if _within(path, heads):
        return FROZEN_HEAD
    inside = not blocks or _within(path, blocks)
    if is_dense(module) or is_convolution(module) or is_quantized(module):
        return NO_METHOD if inside else OUTSIDE
    if part in ("weight", "bias"):
        return f"of {type(module).__name__}, which no method on offer can adapt"
    return "a parameter that a module of the model uses itself, and no layer has"


def _within(name: str, modules: Collection[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in modules)
