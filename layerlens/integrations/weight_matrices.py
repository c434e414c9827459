"""Which weights of torch's modules multiply or are looked up, and as which matrices they do."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch

from layerlens.exceptions import ProfilingError
from layerlens.integrations.quantized import is_quantized
from layerlens.models import ModelSpec

RELATIVE_BIASES = ("relative_attention_bias",)
"""Embeddings that are indexed by pairs of positions, without a batch axis (T5)."""


def matrix_shape(module: Any) -> tuple[int, int, int]:
    """(groups, n_out, n_in) of a module's weight as a matrix for each group; an Embedding's rows are its outputs."""
    if isinstance(module, torch.nn.Embedding):
        return 1, module.num_embeddings, module.embedding_dim
    if isinstance(module, torch.nn.Conv2d):
        patch = module.kernel_size[0] * module.kernel_size[1]
        return module.groups, module.out_channels // module.groups, module.in_channels // module.groups * patch
    if isinstance(module, torch.nn.Linear) or is_quantized(module):
        return 1, module.out_features, module.in_features
    return 1, module.nf, module.nx  # transformers' Conv1D, a Linear with a transposed weight


def conv_patches(module: torch.nn.Conv2d, images__bchw: torch.Tensor, *, groups: int | None = None) -> torch.Tensor:
    """The inputs that each output pixel of a convolution sees, [b, groups, pixels, n_in of a group].

    In the order of ``module.weight[out].flatten()``, so that the layer is a Linear on them, group by group. With
    ``groups`` 1 every output sees all input channels, as the A of PEFT's LoRA does also where the layer has groups.
    """
    padding: Any = module.padding  # a string is refused by why_not_measurable
    patches__bkt = torch.nn.functional.unfold(
        images__bchw,
        module.kernel_size,
        dilation=module.dilation,
        padding=padding,
        stride=module.stride,
    )
    return patches__bkt.unflatten(1, (groups or module.groups, -1)).mT


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

    if isinstance(module, torch.nn.Conv2d):
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return "convolutions with padding other than zeros of a given width are not measured"
        return _overridden(module, torch.nn.Conv2d)
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
    """Why Hugging Face PEFT's LoRA does not fit a Linear, Conv1D or Conv2d; "" where it does.

    PEFT (0.21) gives a convolution an A of r × all input channels, with the kernel, stride and padding of the layer but
    without its dilation, and a 1 × 1 B with the layer's groups; so r must be a multiple of the groups.
    """
    left_out = getattr(module, "layerlens_left_out", "")
    if left_out or not isinstance(module, torch.nn.Conv2d):
        return left_out or why_not_measurable(name, module)
    if module.dilation != (1, 1) and module.kernel_size != (1, 1):
        return "PEFT's LoRA drops the dilation of a convolution"
    if module.padding_mode != "zeros":
        return "PEFT's LoRA drops the padding mode of a convolution"
    if module.groups > 1 and module.groups == module.in_channels:
        return f"PEFT's LoRA of a depthwise convolution needs a rank that is a multiple of its {module.groups} groups"
    return why_not_measurable(name, module)
