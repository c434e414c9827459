"""Generators of LoRA: which there are, and one in a model, whose factors stand in for PEFT's A and B while it trains.

A package offers one by an entry point in its ``pyproject.toml``::

    [project.entry-points."layerlens.generators"]
    mine = "my_package:MyGenerator"

It is called as ``MyGenerator(layers, tasks=1, seed=0)`` with a tuple of ``GeneratedLayer`` and returns a
``torch.nn.Module`` whose ``forward(task)`` gives {layer name: (A [rank, n_in], B [n_out, rank])}, B = 0 at
the start.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ManifestError
from layerlens.integrations.peft import base_of
from layerlens.methods import drop_hooks
from layerlens.registry import nearest_name
from layerlens.tuning.generators.generated_layer import GeneratedLayer

if TYPE_CHECKING:
    import torch

GROUP = "layerlens.generators"
BUILT_IN = "hyperlora"
CHILD, TASK = "layerlens_generator", "_layerlens_task"


def known_generators() -> tuple[str, ...]:
    """Names of all generators, the built-in one first."""
    return (BUILT_IN, *sorted({point.name for point in metadata.entry_points(group=GROUP)} - {BUILT_IN}))


def load_generator(name: str) -> Callable[..., Any]:
    """The generator of this name, to be called with layers.

    Raises:
        ManifestError: there is none of this name, or its package cannot be imported.
    """
    if name == BUILT_IN:
        made: Callable[..., Any] = importlib.import_module("layerlens.tuning.generators.hyperlora").HyperLora
        return made
    points = [point for point in metadata.entry_points(group=GROUP) if point.name == name]
    if not points:
        known = known_generators()
        nearest = nearest_name(name, known)
        hint = f", did you mean {nearest!r}?" if nearest else ";"
        raise ManifestError(
            f"lora.generator: {name!r} is not known{hint} known: {', '.join(known)}. A package adds one by an entry "
            f"point in the group {GROUP}"
        )
    try:
        loaded: Callable[..., Any] = points[0].load()
    except (ImportError, AttributeError) as error:
        raise ManifestError(f"lora.generator: {name!r} ({points[0].value}) cannot be imported: {error}") from error
    return loaded


def attach_generator(
    model: torch.nn.Module, name: str, *, tasks: int = 1, seed: int = 0, **options: Any
) -> torch.nn.Module:
    """Let the generator ``name`` make A and B of every LoRA layer of ``model``; it trains, they do not.

    Args:
        model: a PEFT model with LoRA, as ``apply`` returns it; changed in place.
        name: one of ``known_generators()``.
        tasks: how many tasks it is to tell apart; ``use_task`` chooses.
        seed: of its weights.
        options: passed on to it.

    Returns:
        ``model``; its logits are those of the base model, since B = 0 is demanded.

    Raises:
        ManifestError: unknown generator, no LoRA in the model, or factors of wrong names, shapes, values or with B ≠ 0;
            the model is then unchanged.
    """
    make = load_generator(name)
    layers = _lora_layers(model)
    if not layers:
        raise ManifestError(f"lora.generator: {name!r} needs LoRA layers, and this model has none")
    wanted = tuple(
        GeneratedLayer(path, _columns(layer.lora_A["default"]), len(layer.lora_B["default"].weight), layer.r["default"])
        for path, layer in layers.items()
    )
    generator = make(wanted, tasks=tasks, seed=seed, **options)
    _check(name, generator, wanted)
    base = base_of(model)
    generator.to(next(base.parameters()).device)
    for layer in layers.values():
        for part in (layer.lora_A["default"], layer.lora_B["default"]):
            del part.weight  # a Parameter; what is generated is set as a plain tensor
    setattr(base, TASK, 0)
    base.add_module(CHILD, generator)
    base.register_forward_pre_hook(_generate)
    _generate(base, ())
    return model


def use_task(model: torch.nn.Module, task: int) -> None:
    """Generate for this task from now on.

    Raises:
        ManifestError: the model has no generator.
    """
    base = base_of(model)
    if not has_generator(model):
        raise ManifestError("lora.generator: this model has none, so there is no task to choose")
    setattr(base, TASK, task)
    _generate(base, ())


def has_generator(model: torch.nn.Module) -> bool:
    """Whether the LoRA of ``model`` is still generated."""
    return hasattr(base_of(model), CHILD)


def finish_generator(model: torch.nn.Module) -> torch.nn.Module:
    """Make what the generator gives for its present task ordinary LoRA parameters, and drop it; no logit changes."""
    base = base_of(model)
    if has_generator(model):
        _make_parameters(base)
        delattr(base, CHILD)
        delattr(base, TASK)
        drop_hooks(base, _generate)
    return model


@contextmanager
def ordinary_lora(model: torch.nn.Module) -> Iterator[None]:
    """Inside, A and B are parameters with their present values, for whoever reads the state dict."""
    base = base_of(model)
    if not has_generator(model):
        yield
        return
    _make_parameters(base)
    try:
        yield
    finally:
        for layer in _lora_layers(base).values():
            for part in (layer.lora_A["default"], layer.lora_B["default"]):
                del part.weight
        _generate(base, ())


def _generate(base: Any, args: Any) -> None:
    factors = getattr(base, CHILD)(getattr(base, TASK))
    for name, layer in _lora_layers(base).items():
        a, b = factors[name]
        kernel = tuple(getattr(layer.lora_A["default"], "kernel_size", ()))
        layer.lora_A["default"].weight = a.reshape(len(a), -1, *kernel) if kernel else a
        layer.lora_B["default"].weight = b.reshape(*b.shape, *(1 for _ in kernel)) if kernel else b


def _make_parameters(base: Any) -> None:
    import torch

    _generate(base, ())
    for layer in _lora_layers(base).values():
        for part in (layer.lora_A["default"], layer.lora_B["default"]):
            value = part.weight.detach().clone()
            del part.weight
            part.weight = torch.nn.Parameter(value)


def _lora_layers(model: Any) -> dict[str, Any]:
    """By name, without stacked experts (more than one matrix) and embeddings, which are trained as they are."""
    from peft.tuners.lora import LoraLayer

    layers = {name: layer for name, layer in base_of(model).named_modules() if isinstance(layer, LoraLayer)}
    alone = {name: layer for name, layer in layers.items() if getattr(layer, "num_experts", 1) == 1}
    return {name: layer for name, layer in alone.items() if not layer.lora_embedding_A}


def _columns(part: Any) -> int:
    return int(part.weight.flatten(1).shape[1])


def _check(name: str, generator: Any, layers: tuple[GeneratedLayer, ...]) -> None:
    import torch

    if not isinstance(generator, torch.nn.Module):
        raise ManifestError(f"lora.generator: {name!r} made a {type(generator).__name__}, not a torch.nn.Module")
    factors = generator(0)
    for layer in layers:
        if layer.name not in factors:
            raise ManifestError(f"lora.generator: {name!r} gives no factors for {layer.name}")
        a, b = factors[layer.name]
        if tuple(a.shape) != (layer.rank, layer.n_in) or tuple(b.shape) != (layer.n_out, layer.rank):
            raise ManifestError(
                f"lora.generator: {name!r} gives {layer.name} factors of {tuple(a.shape)} and {tuple(b.shape)}, needed "
                f"are {(layer.rank, layer.n_in)} and {(layer.n_out, layer.rank)}"
            )
        if not bool(a.isfinite().all()) or bool(b.any()):
            raise ManifestError(
                f"lora.generator: {name!r} must begin with finite A and B = 0, but does not for {layer.name}"
            )
