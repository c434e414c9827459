"""Which weights of torch's modules multiply or are looked up, and as which matrices they do."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from typing import Any

import torch

from layerlens.exceptions import ProfilingError
from layerlens.integrations.quantized import is_quantized
from layerlens.models import ModelSpec

CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
RELATIVE_BIASES = ("relative_attention_bias",)
"""Embeddings that are indexed by pairs of positions, without a batch axis (T5)."""


def matrix_shape(module: Any) -> tuple[int, int, int]:
    """(groups, n_out, n_in) of a module's weight as a matrix for each group; an Embedding's rows are its outputs."""
    if isinstance(module, torch.nn.Embedding):
        return 1, module.num_embeddings, module.embedding_dim
    if is_convolution(module):
        patch = math.prod(module.kernel_size)
        return module.groups, module.out_channels // module.groups, module.in_channels // module.groups * patch
    if isinstance(module, torch.nn.Linear) or is_quantized(module):
        return 1, module.out_features, module.in_features
    return 1, module.nf, module.nx  # transformers' Conv1D, a Linear with a transposed weight


def is_convolution(module: Any) -> bool:
    """Whether a module convolves along one, two or three axes."""
    return isinstance(module, CONVOLUTIONS)


def conv_patches(module: Any, inputs__bc: torch.Tensor, *, groups: int | None = None) -> torch.Tensor:
    """The inputs that each output of a convolution sees, [b, groups, outputs along its axes, n_in of a group].

    In the order of ``module.weight[out].flatten()``, so that the layer is a Linear on them, group by group. With
    ``groups`` 1 every output sees all input channels, as the A of PEFT's LoRA does also where the layer has groups.

    Raises:
        ProfilingError: the inputs have no axis of samples.
    """
    axes = len(module.kernel_size)
    if inputs__bc.dim() != axes + 2:
        raise ProfilingError(f"gets {list(inputs__bc.shape)}, which has no axis of samples")
    groups, padding = groups or module.groups, module.padding
    if isinstance(padding, str) or axes == 3:
        inputs__bc, padding = torch.nn.functional.pad(inputs__bc, module._reversed_padding_repeated_twice), (0,) * axes
    if axes == 3:
        return _patches_of_volumes(module, inputs__bc, groups)
    images = inputs__bc[:, :, None] if axes == 1 else inputs__bc
    wide = [(first, *given) if axes == 1 else given for first, given in
            ((1, module.kernel_size), (1, module.dilation), (0, padding), (1, module.stride))]  # fmt: skip
    patches__bkt = torch.nn.functional.unfold(images, *wide)
    return patches__bkt.unflatten(1, (groups, -1)).mT


def _patches_of_volumes(module: Any, padded__bcdhw: torch.Tensor, groups: int) -> torch.Tensor:
    """What ``torch.nn.functional.unfold``, which takes images alone, would make of volumes."""
    found = padded__bcdhw
    for axis in range(3):
        size, dilation = module.kernel_size[axis], module.dilation[axis]
        found = found.unfold(axis + 2, dilation * (size - 1) + 1, module.stride[axis])[..., ::dilation]
    by_group = found.unflatten(1, (groups, -1))  # [b, g, c, three axes, three of the kernel]
    return by_group.permute(0, 1, 3, 4, 5, 2, 6, 7, 8).flatten(5).flatten(2, 4)


def uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    """The module that ``torch.compile(model)`` was made from, or the model itself.

    Raises:
        ProfilingError: modules inside the model are compiled in place, where taps would not be seen.
    """
    model = getattr(model, "_orig_mod", model)
    for name, module in model.named_modules():
        if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
            raise ProfilingError(
                f"{name or 'the model'}: is compiled in place; give the model before torch.compile or .compile()"
            )
    return model


def measurable_modules(model: torch.nn.Module, spec: ModelSpec) -> tuple[str, ...]:
    """Modules outside the layers of ``spec`` whose weights can be measured: with them, nearly every parameter is."""
    model = uncompiled(model)
    layers = {layer.name for layer in spec.layers if layer.groups == 1}  # with groups, LoRA's matrix is not the weight
    return tuple(
        name
        for name, module in model.named_modules()
        if name not in layers
        and isinstance(getattr(module, "weight", None), torch.Tensor)
        and not why_not_measurable(name, module)
    )


def why_not_measurable(name: str, module: torch.nn.Module) -> str:
    """Why a module's weight cannot be measured; "" where it can."""
    from transformers.pytorch_utils import Conv1D

    if getattr(getattr(module, "weight", None), "is_complex", bool)():
        return "its weight is complex, and PEFT's LoRA is real"
    if _is_computed(module):
        return "its weight is recomputed in every pass (weight or spectral normalisation)"
    if is_convolution(module):
        if module.padding_mode != "zeros":
            return "convolutions with padding other than zeros are not measured"
        return _overridden(module, next(base for base in CONVOLUTIONS if isinstance(module, base)))
    if isinstance(module, torch.nn.Embedding):
        if name.endswith(RELATIVE_BIASES):
            return "biases of relative positions are looked up once for the whole batch"
        if module.scale_grad_by_freq or module.max_norm is not None:
            return "embeddings with max_norm or scale_grad_by_freq are not measured"
        return "" if _scales(module) else _overridden(module, torch.nn.Embedding)
    if is_quantized(module):
        return ""  # which unpacks its weight and multiplies with it
    if isinstance(module, torch.nn.Linear):
        return _overridden(module, torch.nn.Linear)
    if isinstance(module, Conv1D):
        return ""
    return f"weights of {type(module).__name__} are not measured"


def _is_computed(module: torch.nn.Module) -> bool:
    """Whether what a module calls its weight is no parameter: one is made of others when it is asked for."""
    by_hook = any(f"weight_{part}" in module._parameters for part in ("g", "orig"))
    return by_hook or torch.nn.utils.parametrize.is_parametrized(module, "weight")


def _overridden(module: torch.nn.Module, base: type[torch.nn.Module]) -> str:
    if type(module).forward is base.forward or (base is torch.nn.Linear and _multiplies(module)):
        return ""
    return f"{type(module).__name__} computes something else than {base.__name__}"


def embedding_scale(module: torch.nn.Embedding) -> float:
    """What an Embedding multiplies its rows with: 1, or the scale of Gemma's, BART's and M2M100's."""
    if type(module).forward is torch.nn.Embedding.forward:
        return 1.0
    return float(torch.as_tensor(module.embed_scale).to(module.weight.dtype))


def _scales(module: torch.nn.Embedding) -> bool:
    """Whether an Embedding of another class multiplies its rows with its ``embed_scale``: tried on a few."""
    scale: Any = getattr(module, "embed_scale", None)
    number = isinstance(scale, (int, float)) or (isinstance(scale, torch.Tensor) and scale.numel() == 1)
    if not number or (isinstance(scale, torch.Tensor) and scale.is_meta):
        return False
    small = copy.copy(module)
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    small._parameters = {"weight": torch.nn.Parameter(weight, requires_grad=False)}
    small._buffers = {name: None if x is None else x.detach().cpu() for name, x in module._buffers.items()}
    small._forward_hooks, small._forward_pre_hooks = OrderedDict(), OrderedDict()
    vars(small).update(num_embeddings=5, embedding_dim=3, padding_idx=None)
    ids = torch.tensor([[0, 4], [2, 4]])
    try:
        with torch.no_grad():
            return torch.allclose(type(module).forward(small, ids), float(scale) * weight[ids])
    except Exception:  # it needs more than its weight and scale
        return False


def _multiplies(module: torch.nn.Module) -> bool:
    """Whether a Linear with a forward pass of its own (Falcon has one) multiplies as a Linear does: tried on a few."""
    small = copy.copy(module)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3, generator=generator)
    bias = None if getattr(module, "bias", None) is None else torch.randn(5, generator=generator)
    small._parameters = {
        "weight": torch.nn.Parameter(weight, requires_grad=False),
        "bias": None if bias is None else torch.nn.Parameter(bias, requires_grad=False),
    }
    small._forward_hooks = OrderedDict()
    small._forward_pre_hooks = OrderedDict()
    vars(small).update(in_features=3, out_features=5)
    x = torch.randn(2, 4, 3, generator=generator)
    try:
        with torch.no_grad():
            return torch.allclose(type(module).forward(small, x), torch.nn.functional.linear(x, weight, bias))
    except Exception:  # it needs more than its weight and bias
        return False


def why_no_lora(name: str, module: Any) -> str:
    """Why Hugging Face PEFT's LoRA does not fit a Linear, Conv1D or convolution; "" where it does.

    PEFT (0.21) gives a convolution an A of r × all input channels, with the kernel, stride and padding of the layer but
    without its dilation, and a 1 × 1 B with the layer's groups; so r must be a multiple of the groups.
    """
    left_out = getattr(module, "layerlens_left_out", "")
    if left_out or not is_convolution(module):
        return left_out or why_not_measurable(name, module)
    if set(module.dilation) != {1} and set(module.kernel_size) != {1}:
        return "PEFT's LoRA drops the dilation of a convolution"
    if module.padding_mode != "zeros":
        return "PEFT's LoRA drops the padding mode of a convolution"
    if module.groups > 1 and module.groups == module.in_channels:
        return f"PEFT's LoRA of a depthwise convolution needs a rank that is a multiple of its {module.groups} groups"
    return why_not_measurable(name, module)
