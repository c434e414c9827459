"""Adapters and prefixes in one safetensors file, beside PEFT's own files; loaded again they give equal logits.

Tensors are named ``<layer>.layerlens_adapter.down_weight`` and so on. One metadata entry, ``layerlens``, lists layer,
method and rank, and says which base model it is for, as JSON (one, because safetensors writes several in no fixed
order). Without PEFT in the model, the
trained parameters of the task head are kept here as well; with PEFT, it saves them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ManifestError
from layerlens.faults import ModulesFault
from layerlens.integrations.peft import base_of
from layerlens.integrations.torch_modules import find_module
from layerlens.methods import added_methods, attached
from layerlens.models import ModelFacts, Option
from layerlens.registry import METHODS
from layerlens.tuning.base_model import check_weights
from layerlens.tuning.inject import before_of, keep_statistics, note_before
from layerlens.utils.atomic import atomic_write_bytes

if TYPE_CHECKING:
    import torch

FORMAT = 1
MOST_RANK = 2**31
MODULES_FILE = "layerlens_modules.safetensors"
BASE_FACTS = ("name_or_path", "fingerprint", "total_params", "head_modules", "new_parameters", "tokens")
"""What the file remembers of the base model, from the manifest."""


def save_modules(model: torch.nn.Module, path: Path) -> Path:
    """Write all adapters and prefixes of ``model`` to the file ``path``, in one step.

    Raises:
        ManifestError: the model has no adapter or prefix, and trains nothing outside PEFT.
        OutputError: the file cannot be written.
    """
    content = model_bytes(model)
    if content is None:
        raise ManifestError("the model has no adapters and no prefixes, so there is nothing to save")
    return atomic_write_bytes(Path(path), content)


def model_bytes(model: torch.nn.Module) -> bytes | None:
    """The content of the file for ``model``; None where PEFT's own files hold everything that is trained."""
    base, before = base_of(model), before_of(model)
    found = attached(base)
    if before is None and not found:  # a model that nobody has tuned, though its parameters may have gradients
        return None
    others = {} if base is not model else _other_trained(model)
    if not found and not others:
        return None
    return modules_bytes(found, others, before.facts if before else ModelFacts())


def modules_bytes(
    modules: Mapping[str, tuple[str, torch.nn.Module]],
    others: Mapping[str, torch.Tensor],
    facts: ModelFacts | None = None,
) -> bytes:
    """The content of the file for (method, module) by layer, and for other trained tensors by name."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in others.items()}
    for layer, (method, module) in modules.items():
        for name, tensor in module.state_dict().items():
            tensors[f"{layer}{METHODS[method].parameter_mark}{name}"] = tensor.cpu().contiguous()
    entries = [{"layer": layer, "method": method, "rank": module.rank} for layer, (method, module) in modules.items()]
    described = {"format": FORMAT, "modules": entries, "others": sorted(others)}
    known = (facts or ModelFacts()).fields()
    described["base"] = {key: known[key] for key in BASE_FACTS if known.get(key)}
    return save(tensors, metadata={"layerlens": json.dumps(described, sort_keys=True)})


def load_modules(
    model: torch.nn.Module, path: Path, *, trainable: bool = True, check_fingerprint: bool = True
) -> torch.nn.Module:
    """Add the adapters and prefixes in the file ``path`` to ``model``, with their saved weights.

    Args:
        model: the base model, or a PEFT model around it, changed in place.
        path: a file that ``save_modules`` or ``export_adapter`` wrote.
        trainable: True if the loaded parameters shall require gradients.
        check_fingerprint: refuse base weights that differ from those that the file was made for, if it records them.

    Returns:
        ``model``.

    Raises:
        ManifestError: not such a file, an unknown module, or tensors of another shape. The model is then unchanged.
    """
    content = read_modules(model, Path(path), check_fingerprint=check_fingerprint)
    return content.put_into(model, trainable=trainable)


@dataclass(frozen=True)
class SavedModules:
    """What a file holds, checked against a base model and not yet in it."""

    modules: tuple[tuple[str, torch.nn.Module, torch.nn.Module], ...]
    others: dict[str, torch.Tensor]
    facts: ModelFacts

    def put_into(self, model: torch.nn.Module, *, trainable: bool) -> torch.nn.Module:
        """Attach everything to the model that it was checked against."""
        import torch

        base = base_of(model)
        state = base.state_dict(keep_vars=True)
        if before_of(base) is None:
            note_before(base, self.facts, [name for name in self.others if name in dict(base.named_parameters())])
            keep_statistics(base, _trained_whole(base, self.others))
        if base is model:
            base.requires_grad_(False)
        for method, target, made in self.modules:
            METHODS[method].attach(base, target, made.requires_grad_(trainable))
        with torch.no_grad():
            for name, tensor in self.others.items():
                state[name].copy_(tensor)
                if isinstance(state[name], torch.nn.Parameter):
                    state[name].requires_grad_(trainable)
        return model


def read_modules(model: torch.nn.Module, path: Path, *, check_fingerprint: bool = True) -> SavedModules:
    """The content of ``path``, checked against ``model``, which is not changed.

    Raises:
        ManifestError: see ``load_modules``.
    """
    base = base_of(model)
    if attached(base):
        raise ManifestError("the model already has adapters or prefixes; load the base model afresh")
    description, tensors = _read(path)
    pairs = []
    for entry in description["modules"]:
        option, method = Option(**entry), METHODS[entry["method"]]
        mark = option.layer + method.parameter_mark
        state = {name.removeprefix(mark): tensors.pop(name) for name in list(tensors) if name.startswith(mark)}
        if sum(tensor.numel() for tensor in state.values()) < option.rank:  # else a wrong rank could fill the memory
            raise ManifestError(
                f"{path}: {option.layer}: its tensors are too small for {option.method} {option.rank}"
            ).of(ModulesFault.FIT)
        made = method.new_module(base, option, seed=0)
        _fill(made, state, option.layer)
        pairs.append((option.method, find_module(base, option.layer), made))
    known = base.state_dict()
    for name, tensor in tensors.items():
        if name not in description["others"] or name not in known or known[name].shape != tensor.shape:
            raise ManifestError(
                f"{path}: tensor {name} {tuple(tensor.shape)} has no place in {type(base).__name__}"
            ).of(ModulesFault.FIT)
    facts = ModelFacts.of(description.get("base", {}))
    if check_fingerprint and base is model:  # LoRA in it hides the base model's names
        check_weights(base, facts, str(path))
    return SavedModules(tuple(pairs), tensors, facts)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    known = added_methods()
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {})["layerlens"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        entries = description["modules"]
        sound = description["format"] == FORMAT and isinstance(description["others"], list)
        sound = sound and all(set(entry) == {"layer", "method", "rank"} for entry in entries)
        sound = sound and all(isinstance(entry["layer"], str) and entry["method"] in known for entry in entries)
        sound = sound and all(type(entry["rank"]) is int and 0 < entry["rank"] <= MOST_RANK for entry in entries)
        sound = sound and all(isinstance(name, str) for name in description["others"])
        sound = sound and isinstance(description.get("base", {}), dict)
    except FileNotFoundError as error:
        raise ManifestError(f"{path}: no such file").of(ModulesFault.MISSING) from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ManifestError(f"{path}: not a file of LayerLens adapters and prefixes ({error})").of(
            ModulesFault.UNREADABLE
        ) from error
    if not sound:
        raise ManifestError(f"{path}: written by another version of LayerLens, or damaged").of(ModulesFault.DESCRIPTION)
    return description, tensors


def _fill(module: torch.nn.Module, state: Mapping[str, torch.Tensor], layer: str) -> None:
    try:
        module.load_state_dict(dict(state))
    except RuntimeError as error:
        raise ManifestError(f"{layer}: the saved tensors do not fit this module: {error}").of(
            ModulesFault.FIT
        ) from error


def _other_trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Trained parameters outside our modules, and buffers (running statistics) of modules that are trained in full."""
    own = tuple(method.parameter_mark for method in added_methods().values())
    others: dict[str, torch.Tensor] = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(mark in name for mark in own)
    }
    persistent = model.state_dict()
    for module_name, module in model.named_modules():
        parameters = list(module.parameters(recurse=False))
        if parameters and all(parameter.requires_grad for parameter in parameters):
            names = (f"{module_name}.{name}" for name, _ in module.named_buffers(recurse=False))
            others |= {name: persistent[name] for name in names if name in persistent}
    return others


def _trained_whole(base: torch.nn.Module, others: Collection[str]) -> list[torch.nn.Module]:
    """Modules whose own parameters are all among ``others``."""
    found = []
    for module_name, module in base.named_modules():
        names = [f"{module_name}.{name}" for name, _ in module.named_parameters(recurse=False)]
        if names and all(name in others for name in names):
            found.append(module)
    return found
