"""Guards around all work on a user's objects: they are restored afterwards, even after an error."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from layerlens.integrations.quantized import weights_kept

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
"""Where torch keeps the hooks of a module."""
Tensors = list[tuple[torch.Tensor, torch.Tensor]]
"""Tensors and copies of what was in them."""


@contextmanager
def untouched(model: torch.nn.Module, changed: Iterable[str] = ()) -> Iterator[None]:
    """Restore ``model`` after the block, in which LayerLens measures it.

    This restores the mode of every module, its hooks, buffers and configuration (models of transformers change it when
    they compute a loss), ``requires_grad`` and ``grad`` of every parameter, the random states of Python, NumPy and
    torch, and torch's number of threads. Weights are not copied.

    Args:
        model: the user's model.
        changed: names of parameters whose values change in the block (a head that is fitted). These are copied.
    """
    with ExitStack() as stack:
        stack.enter_context(random_states_kept())
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        stack.enter_context(weights_kept(model))
        stack.callback(_put_back_modules, [(one, one.training, _hooks_of(one)) for one in model.modules()])
        configs = {id(one.config): one.config for one in model.modules() if hasattr(one, "config")}
        kept = [(one, dict(vars(one))) for one in configs.values() if hasattr(one, "__dict__")]
        stack.callback(_put_back_attributes, kept)
        parameters = [(one, one.requires_grad, one.grad) for one in model.parameters()]
        stack.callback(_put_back_parameters, parameters)
        weights: Tensors = [(one, one.detach().clone()) for one in map(model.get_parameter, changed)]
        stack.callback(_put_back_tensors, weights)
        buffers: Tensors = [(one, one.detach().clone()) for one in model.buffers() if not one.is_meta]
        stack.callback(_put_back_tensors, buffers)
        yield


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch after the block."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


@contextmanager
def loader_kept(loader: Any) -> Iterator[None]:
    """Restore a data loader after the block, in which LayerLens takes batches from it.

    If the loader has a ``state_dict``, its position is restored. The generators of its samplers are restored too.
    """
    parts = [loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler"))]
    parts.append(getattr(parts[2], "sampler", None))
    generators = {id(one): one for one in (getattr(part, "generator", None) for part in parts)}
    states = [(one, one.get_state()) for one in generators.values() if isinstance(one, torch.Generator)]
    place = loader.state_dict() if hasattr(loader, "load_state_dict") and hasattr(loader, "state_dict") else None
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
        if place is not None:
            loader.load_state_dict(place)


def _hooks_of(module: torch.nn.Module) -> dict[str, dict[Any, Any]]:
    return {name: dict(getattr(module, name)) for name in HOOKS}


def _put_back_modules(modules: list[tuple[torch.nn.Module, bool, dict[str, dict[Any, Any]]]]) -> None:
    for module, training, hooks in modules:
        module.training = training
        for name, before in hooks.items():
            there = getattr(module, name)
            if dict(there) != before:
                there.clear()
                there.update(before)


def _put_back_attributes(things: list[tuple[Any, dict[str, Any]]]) -> None:
    for thing, before in things:
        if vars(thing) != before:
            vars(thing).clear()
            vars(thing).update(before)


def _put_back_parameters(parameters: list[tuple[torch.nn.Parameter, bool, torch.Tensor | None]]) -> None:
    for parameter, required, gradient in parameters:
        parameter.requires_grad_(required)
        parameter.grad = gradient


def _put_back_tensors(tensors: Tensors) -> None:
    with torch.no_grad():
        for tensor, before in tensors:
            tensor.copy_(before)
