"""The layers that a configuration asks for: one tower of several, or ``lm_head`` and embeddings beside the blocks."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from layerlens.exceptions import ModelSpecError
from layerlens.integrations.transformers import is_dense
from layerlens.integrations.weight_matrices import is_convolution, why_not_measurable

FIELD = "profiling.layers"


@dataclass(frozen=True)
class AskedLayers:
    """What is asked for.

    Args:
        of_block: path -> block, in the order of the model; None outside the blocks.
        left_out: path -> why it is not among them.
    """

    of_block: dict[str, int | None]
    left_out: dict[str, str]


def layers_asked_for(
    model: torch.nn.Module, of_block: Mapping[str, int | None], patterns: Sequence[str], *, streamed: bool = False
) -> AskedLayers:
    """The layers that the patterns name.

    Args:
        model: has them.
        of_block: path -> block of the layers that are offered where nothing is asked for.
        patterns: for whole names, or for what follows a dot in them, with ``*`` and ``?``.
        streamed: whether the model's weights stay on disk, where only the blocks are measured.

    Raises:
        ModelSpecError: a pattern names no layer, or one that cannot be measured while the weights stay on disk.
    """
    modules = dict(model.named_modules())
    stacked = [path for path in of_block if path not in modules]  # parameters of experts
    for pattern in patterns:
        if not any(_names(pattern, path) for path in (*modules, *stacked) if path):
            near = difflib.get_close_matches(pattern, list(modules), n=3, cutoff=0.4) or list(of_block)[:3]
            raise ModelSpecError(f"{FIELD}: the model has no module {pattern!r}; nearest: {', '.join(near)}")
    found: dict[str, int | None] = {}
    left_out: dict[str, str] = {}
    for path, module in modules.items():
        others = is_dense(module) or is_convolution(module) or isinstance(module, torch.nn.Embedding)
        wanted = path in of_block or others
        if not path or not wanted:
            continue
        if not any(_names(pattern, path) for pattern in patterns):
            left_out |= {path: f"{FIELD} does not name it"} if path in of_block else {}
        elif path in of_block:
            found[path] = of_block[path]
        elif reason := _why_not_outside(path, modules):
            left_out[path] = reason
        else:
            found[path] = None
    for path in stacked:
        if any(_names(pattern, path) for pattern in patterns):
            found[path] = of_block[path]
        else:
            left_out[path] = f"{FIELD} does not name it"
    place = {path: number for number, path in enumerate(of_block)}
    if stacked and all(path in place for path in found):
        found = dict(sorted(found.items(), key=lambda one: place[one[0]]))
    if streamed and (outside := [path for path in found if path not in of_block]):
        raise ModelSpecError(f"{FIELD}: {outside[0]} is outside the blocks, and streaming measures only the blocks")
    if not found:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in left_out.items() if path not in of_block)
        raise ModelSpecError(f"{FIELD}: names no layer that can be adapted{'; ' if reasons else ''}{reasons}")
    return AskedLayers(found, left_out)


def _names(pattern: str, path: str) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")


def _why_not_outside(path: str, modules: Mapping[str, torch.nn.Module]) -> str:
    """Why a module outside the blocks is not a layer; "" where it is one."""
    module = modules[path]
    weight = getattr(module, "weight", None)
    tied = next((name for name, one in modules.items() if one is not module and _weight_is(one, weight)), None)
    if tied:
        return (
            f"its weight is tied to {tied}: PEFT's LoRA would act in {path} only, and merging it would change {tied} "
            "too"
        )
    return why_not_measurable(path, module) if isinstance(module, torch.nn.Embedding) else ""


def _weight_is(module: torch.nn.Module, weight: object) -> bool:
    return weight is not None and getattr(module, "weight", None) is weight
