"""Whether the head of a model in memory was trained, or is as it was initialised: gradients through it say nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from layerlens.exceptions import ConfigurationError
from layerlens.integrations.transformers import blocks_of, new_modules, task_heads, trained_and_drawn

STANDARD_ERRORS = 4.0
"""How far a standard deviation may be from the one of the initialisation to be taken for it."""


@dataclass(frozen=True)
class NewHead:
    """A task head that no checkpoint has.

    Args:
        parameters: their names; none where there is no such head.
        modules: the modules that hold them.
        why: how that is known.
    """

    parameters: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    why: str = ""


def new_head_of(model: torch.nn.Module, task: Any, wanted: bool | Sequence[str] | None) -> NewHead:
    """The task head that is to be trained in full, because no checkpoint has it.

    Known from the checkpoint where the model names one on this machine, else by what its weights look like: biases of
    nothing but zeros, and weights with the standard deviation that the model's configuration initialises them with.

    Args:
        model: the user's.
        task: the ``layerlens.tasks.Task``; None where it is not known. A model whose task needs no head of its own (a
            language model) has none that is new unless the user says so.
        wanted: True or False where the user knows; or names of modules.

    Raises:
        ConfigurationError: a module that the model does not have, or there is no head to be new.
    """
    if wanted is False or (wanted is None and (task is None or not task.new_head)):
        return NewHead()
    heads = task_heads(model)
    if isinstance(wanted, (list, tuple)):
        known = dict(model.named_modules())
        lacking = [name for name in wanted if name not in known]
        if lacking:
            raise ConfigurationError(f"new_head: the model has no module {lacking[0]!r}")
        heads, wanted = tuple(wanted), True
    parameters = tuple(
        name for name, _ in model.named_parameters() if name.startswith(tuple(f"{head}." for head in heads if head))
    )
    if wanted and parameters:
        return NewHead(parameters, heads, "it was said so")
    if wanted:
        raise ConfigurationError(
            "new_head: the model has no task head beside its base; name its modules: ['classifier']"
        )
    stored = _stored_names(model)
    if stored is not None:
        new = tuple(name for name in parameters if not any(_same(name, other) for other in stored))
        if not new:
            return NewHead()
        blocks = tuple(f"{block}." for block in blocks_of(model))
        others = [name for name, _ in model.named_parameters() if not name.startswith(blocks)]
        new += tuple(name for name in others if name not in new and not any(_same(name, other) for other in stored))
        return NewHead(
            trained_and_drawn(model, new)[0],
            new_modules(model, new),
            "the checkpoint that the model was loaded from lacks it",
        )
    if not parameters or not as_initialised(model, parameters):
        return NewHead()
    return NewHead(parameters, heads, "its weights look freshly initialised")


def _stored_names(model: Any) -> set[str] | None:
    """Names of the tensors in the checkpoint that the model was loaded from; None where there is none to look at."""
    folder = Path(str(getattr(model, "name_or_path", "") or "."))
    if not getattr(model, "name_or_path", "") or not folder.is_dir():
        return None
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    try:
        if index.is_file():
            return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        if single.is_file():
            with safe_open(single, "pt") as file:
                return set(file.keys())
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError):
        return None
    return None


def _same(name: str, stored: str) -> bool:
    """Whether a checkpoint's name means the parameter: with a prefix more or less."""
    return name == stored or name.endswith(f".{stored}") or stored.endswith(f".{name}")


def as_initialised(model: Any, parameters: Sequence[str]) -> bool:
    """Whether the weights have the spread that the model's configuration initialises with, and the biases are zeros."""
    spread = getattr(getattr(model, "config", None), "initializer_range", None)
    if not isinstance(spread, float) or not spread > 0:
        return False
    biases = [x for x in map(model.get_parameter, parameters) if x.dim() == 1]
    weights = [x for x in map(model.get_parameter, parameters) if x.dim() > 1 and x.is_floating_point()]
    if any(bool(bias.any()) and not bool((bias == 1).all()) for bias in biases):
        return False
    return bool(weights) and all(
        abs(float(weight.detach().float().std()) / spread - 1.0) < STANDARD_ERRORS / math.sqrt(2.0 * weight.numel())
        for weight in weights
    )
