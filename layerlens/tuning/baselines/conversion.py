"""From a method's own matrices to ordinary LoRA in the same base model, for methods that end with other ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from layerlens.models import Choice
from layerlens.tuning.baselines.interface import BaselineRequest, Finished
from layerlens.tuning.inject import apply
from layerlens.tuning.undo import base_of, unapply

if TYPE_CHECKING:
    import torch


def as_lora(
    request: BaselineRequest,
    model: torch.nn.Module,
    choice: Choice,
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> Finished:
    """A model with the LoRA of ``choice``, A and B from ``factors``, and the task head as ``model`` has trained it.

    Args:
        request: says which modules are the head.
        model: the trained model; it is taken apart.
        choice: ranks and scale.
        factors: A [r, n_in] and B [n_out, r] of every LoRA layer.
    """
    import torch

    kept = {name: (a.detach().clone(), b.detach().clone()) for name, (a, b) in factors.items()}
    heads = request.facts.heads
    trained = {name: _head(model, name).state_dict() for name in heads}
    states = {name: {key: value.clone() for key, value in state.items()} for name, state in trained.items()}
    tuned = apply(unapply(model), choice, facts=request.facts)
    layers = dict(base_of(tuned).named_modules())
    with torch.no_grad():
        for name, (a, b) in kept.items():
            for part, tensor in (("lora_A", a), ("lora_B", b)):
                weight = getattr(layers[name], part)["default"].weight
                weight.copy_(tensor.reshape(weight.shape))
    for name in heads:
        _head(tuned, name).load_state_dict(states[name])
    return Finished(tuned, choice.trainable_params(request.spec), choice)


def _head(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """The module that is trained under this name: PEFT's copy where there is one."""
    module = base_of(model).get_submodule(name)
    copies = getattr(module, "modules_to_save", None)
    trained: torch.nn.Module = module if copies is None else copies["default"]
    return trained
