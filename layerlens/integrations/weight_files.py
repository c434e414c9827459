"""Weights from safetensors files into a model that is already there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from layerlens.exceptions import ModelNotFoundError

if TYPE_CHECKING:
    import torch

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def load_weights(model: torch.nn.Module, place: str, base_dir: Path | None, optional: tuple[str, ...] = ()) -> set[str]:
    """Fill ``model`` in place with what a .safetensors file, or a directory with (sharded) model.safetensors, has.

    Args:
        model: the model.
        place: the file or directory, below ``base_dir`` if it is relative.
        base_dir: folder of the configuration file.
        optional: parameters (of a task head) that the file may lack, or have in another shape.

    Returns:
        Those of ``optional`` that were not filled.

    Raises:
        ModelNotFoundError: no such file, or tensors of another model; names the first that is missing or does not fit.
    """
    import torch

    found = _read(((base_dir or Path()) / Path(place).expanduser()).resolve(), place)
    own = model.state_dict()
    lacking = {name for name in own if name not in found or found[name].shape != own[name].shape}
    wrong = sorted(lacking - set(optional)) + sorted(found.keys() - own.keys())
    if wrong:
        name = wrong[0]
        if name not in own:
            reason = f"has {name}, which {type(model).__name__} has not"
        elif name not in found:
            reason = f"lacks {name}"
        else:
            reason = f"has {name} as {list(found[name].shape)}, the model as {list(own[name].shape)}"
        raise ModelNotFoundError(f"model.weights: {place} {reason} ({len(wrong)} tensors do not fit)")
    with torch.no_grad():
        model.load_state_dict({name: tensor for name, tensor in found.items() if name not in lacking}, strict=False)
    return lacking


def _read(path: Path, place: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = [path]
    if path.is_dir():
        files = [path / SINGLE]
        if (path / INDEX).is_file():
            shards = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
            files = [path / name for name in sorted(set(shards))]
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except FileNotFoundError as error:
            raise ModelNotFoundError(
                f"model.weights: no file at {file}; give a .safetensors file, or a directory with {SINGLE}"
            ) from error
        except (SafetensorError, OSError) as error:
            raise ModelNotFoundError(f"model.weights: {place} is not a readable safetensors file: {error}") from error
    return tensors
