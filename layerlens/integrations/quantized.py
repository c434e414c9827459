"""Linear layers whose weights are stored in fewer bits than they multiply with: what they are, how large, and which.

They are known by how they are stored, not by a list of formats: a layer with ``in_features`` and ``out_features`` whose
weight torch cannot multiply as it lies there (integers, 8-bit floats, tensors of a library's own). Activations and
output gradients are all that statistics need, so nothing is dequantized.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CPU_PACKING = "support_avx512bf16_for_cpu"
"""The flag by which bitsandbytes' 4-bit layers repack their weights as they compute on some CPUs."""
KERNEL_MODE = "linear_mode"
"""What gptqmodel's layers for the CPU note their kernel in: unless "train" stands there, the first call without a
gradient repacks the weights for good, for one that gives none."""


def is_quantized(module: Any) -> bool:
    """Whether the module is a linear layer whose weight is stored in fewer bits than it multiplies with."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if not all(isinstance(size, int) for size in sizes) or hasattr(module, "base_layer"):  # around one: PEFT's
        return False
    weight = module._parameters.get("weight")
    stored = [*module._parameters.values(), *module._buffers.values()] if weight is None else [weight]
    return any(map(_is_packed_part, stored))


def is_packed(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds numbers in a form that is unpacked before they are multiplied."""
    numbers = tensor.is_floating_point() or tensor.is_complex()
    return _parts(tensor) is not None or not numbers or tensor.element_size() == 1


def quantized_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every quantized layer of the model, by name."""
    return {name: module for name, module in model.named_modules() if is_quantized(module)}


def device_of(module: torch.nn.Module) -> torch.device:
    """Where the module's weights lie, be they parameters or buffers."""
    return next(itertools.chain(module.parameters(), module.buffers())).device


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor as it is stored; of one that a library packs those of its parts."""
    parts = _parts(tensor)
    return tensor.numel() * tensor.element_size() if parts is None else sum(map(stored_bytes, parts.values()))


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters, and of the scales and tables of quantized layers."""
    total = sum(map(stored_bytes, model.parameters()))
    for module in quantized_layers(model).values():
        counted = {id(parameter) for parameter in module.parameters()}
        for tensor in _tensors(module.state_dict(keep_vars=True)).values():
            total += 0 if id(tensor) in counted else stored_bytes(tensor)
    return total


def parameter_count(model: torch.nn.Module) -> int:
    """Parameters of the model, each once; of a quantized layer those that it was made from."""
    seen: set[int] = set()
    total = 0
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                total += weight_count(module, name)
        if is_quantized(module) and weight_in_buffers(module):
            total += _size(module)
    return total


def weight_in_buffers(module: torch.nn.Module) -> bool:
    """Whether the weight of a quantized layer is none of its parameters."""
    return not any(map(_is_packed_part, module._parameters.values()))


def weight_count(module: Any, name: str) -> int:
    """How many numbers of the model the parameter ``name`` of a module holds, whatever it is packed into."""
    parameter = module._parameters[name]
    if not is_quantized(module):
        return int(parameter.numel())
    if _is_packed_part(parameter):
        return _size(module)
    return int(parameter.numel()) if name == "bias" else 0  # scales are how the weight is stored


def stable_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What tells the model's weights: its state dict, with 4-bit weights of bitsandbytes in one order.

    These change as they compute: some CPUs get their codes in another order and their scales rounded to bfloat16, and
    the bias takes the precision of the product.
    """
    four_bit = {name: module for name, module in quantized_layers(model).items() if hasattr(module, CPU_PACKING)}
    in_order = {name: _four_bit_state(module) for name, module in four_bit.items()}
    state = _tensors(model.state_dict())
    for name, tensors in in_order.items():
        for key in [key for key in state if key.startswith((f"{name}.weight", f"{name}.bias"))]:
            del state[key]
        state |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    return {key: part for name, tensor in state.items() for key, part in _unpacked(name, tensor)}


@contextmanager
def weights_kept(model: torch.nn.Module) -> Iterator[None]:
    """While open, no layer repacks its weights or computes with repacked ones, through which no gradient goes."""
    flags = {module: getattr(module, CPU_PACKING) for module in model.modules() if hasattr(module, CPU_PACKING)}
    modes = {module: module.linear_mode for module in model.modules() if hasattr(module, KERNEL_MODE)}
    biases = [(module, module.bias.data) for module in flags if getattr(module, "bias", None) is not None]
    try:
        keep_weights(model)
        yield
    finally:
        for module, flag in flags.items():
            setattr(module, CPU_PACKING, flag)
        for module, mode in modes.items():
            setattr(module, KERNEL_MODE, mode)
        for module, bias in biases:
            module.bias.data = bias


def keep_weights(model: torch.nn.Module) -> None:
    """Let no layer of the model repack its weights any more; those that have done so unpack them.

    What bitsandbytes logs in every call of every layer is logged once.
    """
    for name in ("bitsandbytes.autograd._functions", "bitsandbytes.nn.modules"):
        logger = logging.getLogger(name)
        if _Once not in map(type, logger.filters):
            logger.addFilter(_Once())
    for module in model.modules():
        if hasattr(module, CPU_PACKING):
            if _is_repacked(module):
                module.state_dict()  # in which bitsandbytes unpacks
            setattr(module, CPU_PACKING, False)
        if getattr(module, KERNEL_MODE, "") is None:
            setattr(module, KERNEL_MODE, "train")


class _Once(logging.Filter):
    """Lets each message pass once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        new = record.getMessage() not in self._seen
        self._seen.add(record.getMessage())
        return new


def _is_packed_part(parameter: torch.Tensor | None) -> bool:
    return parameter is not None and is_packed(parameter)


def _size(module: Any) -> int:
    return int(module.in_features) * int(module.out_features)


def _is_repacked(module: Any) -> bool:
    return bool(getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False))


def _four_bit_state(module: Any) -> dict[str, torch.Tensor]:
    """Codes, scales and bias of a 4-bit layer of bitsandbytes, the same before and after it computes."""
    import torch
    from bitsandbytes import functional

    codes, state = module.weight.data, module.weight.quant_state
    if state is None:  # not quantized yet
        return dict(_tensors(module.state_dict()))
    if _is_repacked(module):
        scales = state.absmax.T
        codes, _ = functional._convert_weight_packed_for_cpu_inverse(codes, copy.copy(state))
    elif state.nested:
        scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    else:
        scales = state.absmax
    kind = f"{state.quant_type}.{state.blocksize}.{'x'.join(map(str, state.shape))}"
    found = {f"weight.{kind}": codes.contiguous().view(torch.uint8).reshape(-1)}
    found["weight.scales"] = scales.reshape(-1).float().to(torch.bfloat16)
    if module.bias is not None:
        found["bias"] = module.bias.data.to(module.compute_dtype or module.bias.dtype).float()
    return found


def _tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    import torch

    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _parts(tensor: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """The tensors that a library's own kind of tensor consists of; None for torch's."""
    if type(tensor).__module__.startswith("torch.") or not hasattr(tensor, "__tensor_flatten__"):
        return None
    return {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}


def _unpacked(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    parts = _parts(tensor)
    if parts is None:
        yield name, tensor
        return
    for key, part in parts.items():
        yield from _unpacked(f"{name}.{key}", part)
