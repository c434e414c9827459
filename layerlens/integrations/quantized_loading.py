"""How a quantized model is loaded so that it can be trained on, and whether what was loaded can.

Libraries choose kernels for inference where nobody says otherwise: these give no gradient to what comes before them
(gptqmodel's fused kernels), or round activations, through which none goes (compressed-tensors). Some formats are
unpacked as they load where the device has no kernel for them. Both change what is measured and what memory is needed,
so each kind of layer is tried on a few numbers, and what is not as the checkpoint says is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ModelSpecError
from layerlens.integrations.quantized import device_of, quantized_layers

if TYPE_CHECKING:
    import torch

TRAINABLE: dict[str, dict[str, Any]] = {
    "gptq": {"backend": "auto_trainable"},
    "awq": {"backend": "auto_trainable"},
    "compressed-tensors": {"dequantize": True},
}
"""Quantization method -> extra settings for transformers, so that gradients go through the layers.

compressed-tensors unpacks its weights in the first call anyway; told so, it does not round activations too.
"""
AGREES = 0.25
"""Largest relative error of a layer's gradient against its outputs. A layer that rounds activations to 8 bits is off by
some hundredths; one that passes no gradient on, or only that of a part, by nearly all."""


def quantization_arguments(asked: Mapping[str, Any] | None, saved: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` from ``model.quantization`` and the checkpoint's own quantization.

    Raises:
        ModelSpecError: transformers does not know such a quantization.
    """
    wanted = loading_of(asked, saved)
    if not wanted:
        return {}
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        return {"quantization_config": AutoQuantizationConfig.from_dict(wanted)}
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise ModelSpecError(
            f"model.quantization: transformers cannot use {wanted} ({' '.join(str(error).split())}); give what "
            "its quantization configurations take, such as {load_in_4bit: true}"
        ) from error


def loading_of(asked: Mapping[str, Any] | None, saved: Mapping[str, Any] | None) -> dict[str, Any]:
    """A quantization configuration as transformers is given it; nothing where it finds all it needs in the checkpoint.

    Args:
        asked: ``model.quantization``.
        saved: ``quantization_config`` of the checkpoint's configuration.
    """
    said = asked or saved or {}
    trainable = TRAINABLE.get(str(said.get("quant_method", "")), {})
    if asked:
        return {**trainable, **asked}
    return {key: said[key] for key in ("quant_method", "bits") if key in said} | trainable if trainable else {}


def sparing(asked: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """A quantization configuration of transformers by which these modules stay as they are."""
    method = str(asked.get("quant_method", ""))
    key = {"hqq": "skip_modules", "compressed-tensors": "ignore"}.get(method, "modules_to_not_convert")
    if "bitsandbytes" in method or asked.get("load_in_4bit") or asked.get("load_in_8bit"):
        key = "llm_int8_skip_modules"
    return {**asked, key: list(dict.fromkeys([*(asked.get(key) or ()), *modules]))}


def saved_quantization(config: Any) -> dict[str, Any] | None:
    """What a configuration of transformers says of the format of the weights; None where they are dense."""
    found = getattr(config, "quantization_config", None)
    if found is None and hasattr(config, "get_text_config"):
        found = getattr(config.get_text_config(), "quantization_config", None)
    if found is None:
        return None
    return dict(found) if isinstance(found, Mapping) else dict(found.to_dict())


def method_of(quantization: Mapping[str, Any]) -> str:
    """What a quantization is called, such as ``fp8``."""
    method = quantization.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in quantization else "unknown")
    return str(getattr(method, "value", method))


def refuse_other_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Raise where a quantized layer does not take and put out numbers of the model's dtype.

    Raises:
        ModelSpecError: with the dtype that it takes.
    """
    import torch

    for name, layer in _kinds(model):
        if (came := _put_out(layer, dtype)) == dtype:
            continue
        others = [x for x in (torch.bfloat16, torch.float16, torch.float32) if x != dtype and _put_out(layer, x) == x]
        advice = f"set model.dtype: {_name(others[0])}" if others else "no dtype of model.dtype fits it"
        said = "cannot multiply" if came is None else f"puts out {_name(came)} for"
        raise ModelSpecError(f"model.dtype: {type(layer).__name__} ({name}) {said} {_name(dtype)}; {advice}")


def notes_on(model: torch.nn.Module, saved: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """What one has to know of how quantized weights were loaded, a sentence each.

    Args:
        model: as it was loaded.
        saved: the format that the checkpoint says its weights have; None where it says none, or there is none.
    """
    notes = []
    if saved and not quantized_layers(model):
        stored = next((x.dtype for x in model.parameters() if x.is_floating_point()), None)
        notes.append(
            f"model: the checkpoint's weights are quantized ({method_of(saved)}), and loading unpacked them to "
            f"{_name(stored)}: memory and fingerprint describe the unpacked weights"
        )
    return (*notes, *_stopped(model))


def _stopped(model: torch.nn.Module) -> Iterator[str]:
    """Kinds of quantized layers that give no right gradient to what comes before them."""
    layers = quantized_layers(model)
    for name, layer in _kinds(model):
        if passes_gradient(layer):
            continue
        kind = _kind(layer)
        count = sum(_kind(other) == kind for other in layers.values())
        called = type(layer).__name__
        if kind[1] is not None and not kind[1].__module__.startswith("torch."):
            called = f"{called} of {kind[1].__name__}"
        yield (
            f"model: {called} ({count} layers, {name} ...) does not pass on correct gradients, so layers below it get "
            "no gradient or a wrong one, here and in training; load the weights with a kernel for training, or "
            "quantize only the weights"
        )


def passes_gradient(layer: Any) -> bool:
    """Whether the gradient that a quantized layer gives its inputs is that of what it computes.

    For y = W x + b and any d the gradient of d·y is g = Wᵀd, so d·(f(g) − f(0)) is ‖g‖².
    """
    import torch

    dtype = _usual(layer)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, layer.in_features, generator=generator).to(device_of(layer), dtype).requires_grad_(True)
    d = torch.randn(4, layer.out_features, generator=generator).to(device_of(layer))
    try:
        with torch.enable_grad():
            y = layer(x)
            if not y.requires_grad:
                return False
            (g,) = torch.autograd.grad((d * y.float()).sum(), x)
        with torch.no_grad():
            change = float((d * (layer(g) - layer(torch.zeros_like(g))).float()).sum())
    except RuntimeError:
        return False
    wanted = float(g.float().square().sum())
    return wanted > 0 and abs(change - wanted) <= AGREES * wanted


def _put_out(layer: Any, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype of what a layer puts out for inputs of one; None where it takes none of it."""
    import torch

    try:
        with torch.no_grad():
            found: torch.dtype = layer(torch.zeros(4, layer.in_features, dtype=dtype, device=device_of(layer))).dtype
            return found
    except (RuntimeError, TypeError, ValueError, AssertionError):
        return None


def _usual(layer: Any) -> torch.dtype:
    import torch

    known = (torch.float32, torch.bfloat16)
    return next((dtype for dtype in known if _put_out(layer, dtype) == dtype), torch.float16)


def _kinds(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of the first layer of each kind that lies where it can compute."""
    seen = set()
    for name, layer in quantized_layers(model).items():
        if _kind(layer) not in seen and device_of(layer).type != "meta":
            seen.add(_kind(layer))
            yield name, layer


def _kind(layer: Any) -> tuple[type, type | None]:
    weight = layer._parameters.get("weight")
    return type(layer), None if weight is None else type(weight)


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
