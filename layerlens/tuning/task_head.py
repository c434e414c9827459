"""The weights of a new task head: as a run fitted them, in a file beside its manifest, and in what PEFT reads.

No checkpoint has them, so whoever loads the base model again gets a head of random numbers. They are part of what a run
made: ``head.safetensors`` has them by the base model's names, ``peft/`` by PEFT's (its ``modules_to_save``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from layerlens.exceptions import ManifestError, StorageError
from layerlens.integrations.peft import BASE_PREFIX, base_of
from layerlens.storage import local_file
from layerlens.utils.atomic import atomic_write_bytes

if TYPE_CHECKING:
    import torch

HEAD_FILE = "head.safetensors"
FOUND_BY_PEFT = ("classifier", "score")
"""The endings of modules that PEFT trains for a task type of its own, besides those in its configuration."""

Head = Mapping[str, Any]
"""Tensors or arrays of a task head, by the base model's names."""


def write_head(head: Head, directory: Path) -> dict[str, Path]:
    """Write a fitted head into ``directory``; the path by its name, nothing where no head is new."""
    if not head:
        return {}
    return {"head": atomic_write_bytes(directory / HEAD_FILE, _bytes_of(head))}


def _bytes_of(head: Head) -> bytes:
    """A safetensors file; arrays, which statistics have, are written without torch and as torch writes them."""
    metadata = {"format": "pt"}
    if all(isinstance(value, np.ndarray) for value in head.values()):
        from safetensors.numpy import save as save_arrays

        return save_arrays({name: np.ascontiguousarray(value) for name, value in head.items()}, metadata=metadata)
    from safetensors.torch import save

    return save({name: _tensor(value).contiguous().clone() for name, value in head.items()}, metadata=metadata)


def read_head(directory: Path) -> dict[str, torch.Tensor]:
    """The head that a run wrote beside its manifest in ``directory``; empty where it wrote none.

    Raises:
        ManifestError: the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        path = local_file(directory / HEAD_FILE)
    except StorageError:  # nothing is at that URL
        return {}
    if not path.is_file():
        return {}
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise ManifestError(f"{path}: is damaged or cut short ({error}); run again, or remove it") from error


def head_tensors(
    model: torch.nn.Module, config: Any, head: Head | None = None, tied: Sequence[str] = ()
) -> dict[str, torch.Tensor]:
    """What adapter_model.safetensors has of the modules that PEFT trains whole, by its names there.

    Args:
        model: the base model, which is not changed.
        config: a PEFT configuration; its ``modules_to_save`` are trained in full.
        head: their weights; those of the model where one is not in it.
        tied: modules that have the weight of a trained embedding, which PEFT keeps twice.

    Raises:
        ManifestError: a tensor of ``head`` has no place in the model, or a weight is nowhere.
    """
    head = head or {}
    state = model.state_dict(keep_vars=True)
    _check_places(state, head)
    found = {}
    for module in dict.fromkeys((*saved_modules(model, config), *tied)):
        inside = model.get_submodule(module)
        for end in inside.state_dict():
            name = f"{module}.{end}"
            tensor = like(head[name], state[name]) if name in head else state[name].detach()
            if tensor.is_meta:
                raise ManifestError(f"{name}: is trained with the task head, and its weight is not in memory")
            found[f"{BASE_PREFIX}{name}"] = tensor.cpu().contiguous().clone()
    return found


def saved_modules(model: torch.nn.Module, config: Any) -> list[str]:
    """Paths of the modules that PEFT replaces by a trained copy: it compares endings of names."""
    endings = tuple(config.modules_to_save or ())
    if config.task_type in ("SEQ_CLS", "TOKEN_CLS"):
        endings += FOUND_BY_PEFT
    found: list[str] = []
    for name, _ in model.named_modules(remove_duplicate=False):
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if endings and name.endswith(endings) and not inside:
            found.append(name)
    return found


def begin_head(tuned: torch.nn.Module, head: Head) -> None:
    """Let the trained head of a model begin from ``head``: PEFT's copy of it, or the head itself where there is none.

    Raises:
        ManifestError: a tensor has no place in the model, which is then unchanged.
    """
    import torch

    base: Any = base_of(tuned)
    state = dict(base.state_dict(keep_vars=True))
    for path, copy in _copies(base).items():
        state |= {f"{path}.{end}": tensor for end, tensor in copy.state_dict(keep_vars=True).items()}
    _check_places(state, head)
    with torch.no_grad():
        for name, value in head.items():
            state[name].copy_(_tensor(value))


def check_head(model: torch.nn.Module, head: Head) -> None:
    """Refuse a head of another model, before anything is changed.

    Raises:
        ManifestError: names the tensor, its shape and the model's.
    """
    _check_places(model.state_dict(), head)


def _copies(base: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Path -> the copy that PEFT trains, of every module that it trains whole."""
    from peft.utils.other import ModulesToSaveWrapper

    found = {}
    for name, module in base.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            found[name] = module.modules_to_save[module.active_adapters[0]]
    return found


def _check_places(state: Mapping[str, torch.Tensor], head: Head) -> None:
    for name, value in head.items():
        if name not in state:
            raise ManifestError(f"{HEAD_FILE}: {name} has no place in the base model; it was written for another one")
        if tuple(state[name].shape) != tuple(value.shape):
            raise ManifestError(
                f"{HEAD_FILE}: {name} is {tuple(value.shape)}, in the base model {tuple(state[name].shape)}; load it "
                "with as many labels as it was fitted for"
            )


def _tensor(value: Any) -> torch.Tensor:
    import torch

    return torch.as_tensor(value).detach()


def like(value: Any, own: torch.Tensor) -> torch.Tensor:
    """In the precision of the model: float32 holds what a model of half precision had."""
    return _tensor(value).to(own.dtype)
