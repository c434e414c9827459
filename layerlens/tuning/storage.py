"""Adapters and prefixes in one safetensors file, beside PEFT's own files; loaded again they give equal logits.

Tensors are named ``<layer>.layerlens_adapter.down_weight`` and so on. One metadata entry, ``layerlens``, lists layer,
method and rank as JSON (one, because safetensors writes several in no fixed order). Without PEFT in the model, the
trained parameters of the task head are kept here as well; with PEFT, it saves them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ManifestError
from layerlens.integrations.torch_modules import find_module
from layerlens.models import ManifestRow
from layerlens.utils.atomic import atomic_write_bytes

if TYPE_CHECKING:
    import torch

FORMAT = 1


def save_modules(model: torch.nn.Module, path: Path) -> Path:
    """Write every adapter and prefix of ``model`` to ``path``, atomically.

    Raises:
        ManifestError: the model has none.
        OutputError: the file cannot be written.
    """
    from layerlens.tuning.modules import attached

    base = _base(model)
    found = attached(base)
    if not found:
        raise ManifestError("the model has no adapters and no prefixes, so there is nothing to save")
    return atomic_write_bytes(Path(path), modules_bytes(found, {} if base is not model else _other_trained(model)))


def modules_bytes(
    modules: Mapping[str, tuple[str, torch.nn.Module]], others: Mapping[str, torch.nn.Parameter]
) -> bytes:
    """The content of the file for (method, module) by layer, and for other trained parameters by name."""
    from safetensors.torch import save

    from layerlens.tuning.modules import CHILDREN

    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in others.items()}
    for layer, (method, module) in modules.items():
        for name, tensor in module.state_dict().items():
            tensors[f"{layer}.{CHILDREN[method]}.{name}"] = tensor.cpu().contiguous()
    entries = [{"layer": layer, "method": method, "rank": module.rank} for layer, (method, module) in modules.items()]
    description = json.dumps({"format": FORMAT, "modules": entries, "others": sorted(others)})
    return save(tensors, metadata={"layerlens": description})


def load_modules(model: torch.nn.Module, path: Path, *, trainable: bool = True) -> torch.nn.Module:
    """Attach the adapters and prefixes of ``path`` to ``model``, with their saved weights.

    Args:
        model: the base model, or a PEFT model around it; it is changed in place.
        path: what ``save_modules`` or ``export_adapter`` wrote.
        trainable: whether the loaded parameters require gradients.

    Returns:
        ``model``.

    Raises:
        ManifestError: not such a file, an unknown module, or tensors of another shape; the model is then unchanged.
    """
    import torch

    from layerlens.tuning.modules import CHILDREN, attach, attached, new_module

    base = _base(model)
    if attached(base):
        raise ManifestError("the model already has adapters or prefixes; load the base model afresh")
    description, tensors = _read(Path(path))
    pairs = []
    for entry in description["modules"]:
        mark = f"{entry['layer']}.{CHILDREN[entry['method']]}."
        state = {name.removeprefix(mark): tensors.pop(name) for name in list(tensors) if name.startswith(mark)}
        row = ManifestRow(**entry, utility=0, cost=_count(state), flops=0, vram=0, latency=0, total_score=0)
        target = find_module(base, row.layer)
        made = new_module(base, target, row, seed=0)
        _fill(made, state, row.layer)
        pairs.append((target, made.requires_grad_(trainable)))
    parameters = dict(base.named_parameters())
    for name, tensor in tensors.items():
        if name not in description["others"] or name not in parameters or parameters[name].shape != tensor.shape:
            raise ManifestError(f"{path}: tensor {name} {tuple(tensor.shape)} has no place in {type(base).__name__}")
    for target, made in pairs:
        attach(base, target, made)
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
            parameters[name].requires_grad_(trainable)
    return model


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    from layerlens.tuning.modules import CHILDREN

    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {})["layerlens"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        entries = description["modules"]
        sound = description["format"] == FORMAT and isinstance(description["others"], list)
        sound = sound and all(set(entry) == {"layer", "method", "rank"} for entry in entries)
        sound = sound and all(entry["method"] in CHILDREN and entry["rank"] > 0 for entry in entries)
    except FileNotFoundError as error:
        raise ManifestError(f"{path}: no such file") from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"{path}: not a file of LayerLens adapters and prefixes ({error})") from error
    if not sound:
        raise ManifestError(f"{path}: written by another version of LayerLens, or damaged")
    return description, tensors


def _fill(module: torch.nn.Module, state: Mapping[str, torch.Tensor], layer: str) -> None:
    try:
        module.load_state_dict(dict(state))
    except RuntimeError as error:
        raise ManifestError(f"{layer}: the saved tensors do not fit this module: {error}") from error


def _count(state: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in state.values())


def _base(model: Any) -> torch.nn.Module:
    """The model inside a PEFT model, else the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _other_trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    from layerlens.tuning.modules import CHILDREN

    own = tuple(f".{child}." for child in CHILDREN.values())
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(mark in name for mark in own)
    }
