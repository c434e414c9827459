"""What PEFT would refuse, asked of PEFT itself before anything is chosen: LoRA put into a copy without weights.

PEFT knows modules that it cannot adapt in some models (Mamba's ``out_proj``, whose weight fused kernels read without
calling the module), and which they are changes from version to version; so there is no list of them here.

Quantized layers are Linear ones in the copy; whether PEFT adapts their kind is asked of one that is really there.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from layerlens.integrations.peft import injected_ranks, target_modules
from layerlens.integrations.quantized import is_quantized, quantized_layers
from layerlens.integrations.transformers import dense_shape


def refused_by_peft(model: torch.nn.Module, paths: Sequence[str]) -> dict[str, str]:
    """Path -> why PEFT would not put LoRA there, of the layers at ``paths``; the model is not changed.

    Layers are asked about together; where PEFT refuses, one for each kind (the end of its path, and its class).
    """
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():  # torch crashes where a model is copied while tensors without data are made
        return _refused(model, paths)


def _refused(model: torch.nn.Module, paths: Sequence[str]) -> dict[str, str]:
    found = _refused_kinds(model, [path for path in paths if is_quantized(model.get_submodule(path))])
    paths = [path for path in paths if path not in found]
    twin = _without_weights(model)
    if twin is None or not paths:
        return found
    if refusal := _why_not_loaded(twin):
        return found | dict.fromkeys(paths, refusal)
    refusal, without = _asked(twin, paths)
    if refusal:
        kinds: dict[tuple[str, type], list[str]] = {}
        for path in paths:
            kinds.setdefault((path.rpartition(".")[2], type(model.get_submodule(path))), []).append(path)
        for alike in kinds.values():
            reason, _ = _asked(twin, alike[:1])
            found |= dict.fromkeys(alike, reason) if reason else {}
        _, without = _asked(twin, [path for path in paths if path not in found])
    return found | dict.fromkeys(without, f"PEFT {_version()} puts no LoRA there")


def _refused_kinds(model: Any, paths: Sequence[str]) -> dict[str, str]:
    """Path -> why PEFT adapts no layer that is quantized like this one."""
    reasons: dict[tuple[type, type], str] = {}
    found: dict[str, str] = {}
    for path in paths:
        layer = model.get_submodule(path)
        kind = type(layer), type(layer._parameters.get("weight"))
        if kind not in reasons:
            reasons[kind] = refused_kind(layer, "LoraConfig", config=getattr(model, "config", None), r=1)
        if reasons[kind]:
            found[path] = reasons[kind]
    return found


def refused_kind(layer: Any, peft_config: str, *, config: Any = None, **fields: Any) -> str:
    """Why PEFT puts an adapter of this configuration on no layer that is quantized like this one; "" where it does.

    Args:
        layer: not changed.
        peft_config: the name of PEFT's class.
        config: of the model.
        fields: of PEFT's configuration.
    """
    import peft

    if not is_quantized(layer):
        return ""
    flags = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
    holder: Any = torch.nn.Sequential(layer, torch.nn.Linear(1, 1))  # PEFT asks for some parameter
    holder.config = config
    holder.is_loaded_in_4bit = holder.is_loaded_in_8bit = True
    reason = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.inject_adapter_in_model(getattr(peft, peft_config)(target_modules=["0"], **fields), holder)
    except Exception as error:
        reason = f"PEFT {_version()} refuses {type(layer).__name__}: {_first_sentence(error)}"
    for parameter, required in flags:
        parameter.requires_grad_(required)
    return reason


def _why_not_loaded(twin: torch.nn.Module) -> str:
    """Why PEFT could not load an adapter onto the model, which it does by ``load_state_dict`` of its tensors alone."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numbers that stay on the meta device
            twin.load_state_dict({}, strict=False)
    except Exception as error:  # torchvision's MNASNet wants the version that its own files have
        return f"PEFT {_version()} cannot load an adapter onto {type(twin).__name__}: {_first_sentence(error)}"
    return ""


def _asked(twin: torch.nn.Module, paths: Sequence[str]) -> tuple[str, list[str]]:
    """(why PEFT refuses these layers, or "", those that it takes and passes over)."""
    from peft import LoraConfig, get_peft_model

    if not paths:
        return "", []
    groups = {path: getattr(twin.get_submodule(path), "groups", 1) for path in paths}
    ranks = {f"^{re.escape(path)}": n for path, n in groups.items() if n > 1}
    config = LoraConfig(
        target_modules=target_modules(twin, list(paths)), r=1, rank_pattern=ranks,
        fan_in_fan_out=any(hasattr(twin.get_submodule(path), "nf") for path in paths),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tuned: Any = get_peft_model(copy.deepcopy(twin), config, low_cpu_mem_usage=True)
        except Exception as error:  # whatever it says, it would say again after the choice
            return f"PEFT {_version()} refuses it: {_first_sentence(error)}", []
    return "", sorted(set(paths) - set(injected_ranks(tuned)))


def _without_weights(model: torch.nn.Module) -> torch.nn.Module | None:
    """A copy on the meta device that never holds the weights; None of a model that cannot be copied."""
    try:
        layers = list(quantized_layers(model).values())
        memo: dict[int, Any] = {id(layer): torch.nn.Linear(*dense_shape(layer), device="meta") for layer in layers}
        packed = {id(tensor) for layer in layers for tensor in (*layer.parameters(), *layer.buffers())}
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) in packed:
                continue
            empty = torch.empty_like(tensor, device="meta", requires_grad=False)
            parameter = isinstance(tensor, torch.nn.Parameter)
            memo[id(tensor)] = torch.nn.Parameter(empty, requires_grad=False) if parameter else empty
        return copy.deepcopy(model, memo)
    except Exception:  # a user's own model: PEFT is asked when the choice is put into it
        return None


def _first_sentence(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0].partition("] ")
    return (text[2] or text[0]).partition(". ")[0].strip(" .") or type(error).__name__


def _version() -> str:
    from peft import __version__

    return str(__version__)
