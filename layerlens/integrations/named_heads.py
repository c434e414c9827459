"""Modules that are trained in full because the user says so, or because a model of the user's own has them fresh."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from layerlens.exceptions import ModelSpecError
from layerlens.integrations.new_head import as_initialised
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.integrations.transformers import task_heads

FIELD = "model.head"
MOST_COMPARED = 4096
LIKELY = 0.01
"""Smallest probability of a weight's numbers at which they are taken for drawn ones."""
STANDARD_SPREADS = (0.01, 0.02)
"""Standard deviations that torchvision and timm draw the weights of heads with."""


def with_heads(pretrained: PretrainedModel, patterns: Sequence[str] | None, *, built_here: bool) -> PretrainedModel:
    """The model with the modules that are trained in full beside what is chosen.

    Args:
        pretrained: as its source loaded it.
        patterns: for the names of modules, or for what follows a dot in them; None where the user does not say: of a
            model of the user's own then the modules beside its named base whose weights look freshly initialised.
        built_here: whether the user's code built it, so that nothing says which of its parameters a checkpoint has.

    Raises:
        ModelSpecError: a pattern names no module with parameters, or PEFT would take other modules for the head too.
    """
    model = pretrained.model
    if patterns is None:
        return _guessed(pretrained) if built_here else pretrained
    heads = _named(model, patterns)
    _refuse_likenesses(model, heads)
    if not built_here or not heads:
        return replace(pretrained, heads=heads)
    fresh = tuple(
        name for head in heads if looks_drawn(model.get_submodule(head), model) for name in _parameters_of(model, head)
    )
    return replace(pretrained, heads=heads, new_parameters=fresh)


def looks_drawn(module: torch.nn.Module, model: Any) -> bool:
    """Whether all weight matrices in ``module`` have the numbers that a library draws, or nothing but zeros."""
    layers: list[Any] = [
        one for one in module.modules() if isinstance(getattr(one, "weight", None), torch.nn.Parameter)
    ]
    of_matrices = [one for one in layers if one.weight.dim() > 1]
    spread = getattr(getattr(model, "config", None), "initializer_range", None)
    spreads = (*STANDARD_SPREADS, *([spread] if isinstance(spread, float) else []))
    return bool(of_matrices) and all(_drawn(one, spreads) for one in of_matrices)


def last_layer(model: torch.nn.Module) -> str:
    """The last module with a weight matrix of its own; "" for none."""
    found = ""
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.modules.conv._ConvNd)):
            found = name
    return found


def note_of_fresh(pretrained: PretrainedModel) -> str:
    """What to tell of a last layer that looks fresh and is not trained in full; "" where it does not, or is."""
    model = pretrained.model
    name = last_layer(model)
    if not name or any(
        name == head or name.startswith(f"{head}.") for head in (*(pretrained.heads or ()), *task_heads(model))
    ):
        return ""
    if not looks_drawn(model.get_submodule(name), model):
        return ""
    return (
        f"model: the weights of the last layer, {name}, look freshly initialised, and the layer is not trained in "
        f"full; if it is a new head, set {FIELD}: [{name}] (or {FIELD}: [] if there is none)"
    )


def _guessed(pretrained: PretrainedModel) -> PretrainedModel:
    model: Any = pretrained.model
    if not hasattr(model, "get_classifier") and not hasattr(model, getattr(model, "base_model_prefix", "") or "-"):
        return pretrained
    heads = tuple(head for head in task_heads(model) if head and not _shared(model, head))
    parameters = tuple(name for head in heads for name in _parameters_of(model, head))
    drawn = all(looks_drawn(model.get_submodule(head), model) for head in heads)
    if not parameters or not (drawn or as_initialised(model, parameters)):
        return pretrained
    note = (
        f"new head: {', '.join(heads)}: its weights look freshly initialised, so it is trained in full and saved with "
        f"the adapter ({FIELD}: [] if there is none)"
    )
    return replace(pretrained, heads=heads, new_parameters=parameters, notes=(*pretrained.notes, note))


def _named(model: torch.nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    modules = {name: module for name, module in model.named_modules() if name}
    found: dict[str, None] = {}
    for pattern in patterns:
        names = [name for name in modules if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")]
        with_weights = [name for name in names if any(True for _ in modules[name].parameters())]
        if not with_weights:
            near = difflib.get_close_matches(pattern, modules, n=3)
            what = "a module without parameters" if names else "no module"
            known = ", ".join(near or [name for name, _ in model.named_children()])
            raise ModelSpecError(f"{FIELD}: {pattern!r} names {what} of {type(model).__name__}; it has {known}")
        found |= dict.fromkeys(with_weights)
    return tuple(name for name in found if not any(name.startswith(f"{outer}.") for outer in found))


def _refuse_likenesses(model: torch.nn.Module, heads: Sequence[str]) -> None:
    """PEFT compares the endings of names: a module whose name ends with a head's would be trained in full too."""
    for name, _ in model.named_modules():
        if name in heads or any(name.startswith(f"{head}.") for head in heads):
            continue
        alike = next((head for head in heads if name.endswith(head)), None)
        if alike is not None:
            raise ModelSpecError(
                f"{FIELD}: PEFT identifies fully trained modules by the ends of their names, so it would confuse "
                f"{name} with {alike}; give the head another name in your model, or name both: {FIELD}: [{alike}, "
                f"{name}]"
            )


def _parameters_of(model: torch.nn.Module, head: str) -> list[str]:
    return [f"{head}.{name}" for name, _ in model.get_submodule(head).named_parameters()]


def _shared(model: torch.nn.Module, head: str) -> bool:
    """Whether a parameter of the head is one of another module too (a tied output layer)."""
    own = {id(parameter) for parameter in model.get_submodule(head).parameters()}
    inside = f"{head}."
    return any(
        id(parameter) in own and not name.startswith(inside)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    )


def _drawn(layer: Any, spreads: Sequence[float]) -> bool:
    """Whether a layer's weights are zeros, uniform between the bounds of torch's own initialisation, or normal with one
    of ``spreads`` (truncated or not) and no bias; by Kolmogorov and Smirnov's test.
    """
    from scipy.stats import kstest

    weight, bias = layer.weight.detach(), getattr(layer, "bias", None)
    numbers = weight.flatten()[:: max(1, weight.numel() // MOST_COMPARED)].float().cpu().numpy()
    no_bias = bias is None or not bool(bias.detach().any())
    if not numbers.any():
        return no_bias
    fans = (weight[0].numel(), weight.shape[0])
    for bound in (fan**-0.5 for fan in fans):
        within = bias is None or bool((bias.detach().abs() <= bound * 1.001).all())
        if (
            within
            and abs(numbers).max() <= bound * 1.001
            and kstest(numbers / bound, "uniform", (-1, 2)).pvalue > LIKELY
        ):
            return True
    return no_bias and any(kstest(numbers / spread, "norm").pvalue > LIKELY for spread in spreads)
