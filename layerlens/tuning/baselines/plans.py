"""Choices of baselines: uniform and proportional sizes within a budget, and models that are trained as they say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ConfigurationError
from layerlens.models import Choice, LayerSpec, LoraSettings, ModelFacts, trainable_params
from layerlens.tuning.baselines.interface import BaselineRequest, Finished, Prepared
from layerlens.tuning.inject import apply

if TYPE_CHECKING:
    import torch

ATTENTION = "attention"


def layers_with(request: BaselineRequest, method: str, *, dense: bool = False) -> tuple[LayerSpec, ...]:
    """Layers that offer ``method``, without grouped convolutions; ``dense`` leaves all convolutions out.

    Raises:
        ConfigurationError: there are none.
    """
    from layerlens.integrations.transformers import is_dense

    found = tuple(layer for layer in request.spec.layers if method in layer.methods)
    if method == "lora":  # ranks of grouped convolutions are multiples of their groups, which no rule here knows
        found = tuple(layer for layer in found if getattr(request.model.get_submodule(layer.name), "groups", 1) == 1)
    if dense:
        found = tuple(layer for layer in found if is_dense(request.model.get_submodule(layer.name)))
    if not found:
        raise ConfigurationError(f"baseline: no layer of this model can take {method}{' as a Linear' * dense}")
    return found


def uniform_size(layers: Sequence[LayerSpec], method: str, budget: int) -> int:
    """The largest size with which ``method`` on all ``layers`` stays within ``budget``.

    Raises:
        ConfigurationError: size 1 is too much; the message has the smallest budget that would do.
    """
    cost: Callable[[int], int] = lambda size: sum(trainable_params(layer, method, size) for layer in layers)  # noqa: E731
    least, slope = cost(1), cost(2) - cost(1)
    if least > budget:
        raise ConfigurationError(
            f"baseline: {method} of size 1 on {len(layers)} layers trains {least:,} parameters, more than the "
            f"budget of {budget:,}; give at least {least:,}"
        )
    largest = min(min(layer.n_in, layer.n_out) for layer in layers) if method == "lora" else math.inf
    return int(min(largest, 1 + (budget - least) // slope))


def proportional_ranks(
    layers: Sequence[LayerSpec], weights: Mapping[str, float], budget: int, *, least: int = 0, most: int | None = None
) -> dict[str, int]:
    """LoRA ranks in proportion to ``weights``, as near to ``budget`` as whole ranks allow.

    The scale is the largest with Σ rank·(n_in + n_out) within the budget; what is left goes to the layers that
    rounding cut most, one rank each.

    Args:
        layers: layers to choose ranks for.
        weights: not negative, by layer name.
        budget: trainable parameters.
        least, most: limits of every rank; a layer's smaller side limits it too.

    Raises:
        ConfigurationError: the least ranks are too much.
    """
    cost = {layer.name: layer.n_in + layer.n_out for layer in layers}
    limit = {layer.name: min(layer.n_in, layer.n_out, most or layer.n_in) for layer in layers}
    scale_of = {name: max(float(weights[name]), 0.0) for name in cost}

    def ranks(scale: float) -> dict[str, int]:
        return {name: min(limit[name], max(least, math.floor(scale * scale_of[name]))) for name in cost}

    def used(chosen: Mapping[str, int]) -> int:
        return sum(rank * cost[name] for name, rank in chosen.items())

    if used(ranks(0.0)) > budget:
        raise ConfigurationError(
            f"baseline: rank {least} on {len(layers)} layers trains {used(ranks(0.0)):,} parameters, more than the "
            f"budget of {budget:,}"
        )
    low, high = 0.0, 1.0
    while used(ranks(high)) <= budget and any(ranks(high)[name] < limit[name] for name in cost if scale_of[name] > 0.0):
        low, high = high, 2.0 * high
    for _ in range(60):  # to the last bit of the scale
        middle = 0.5 * (low + high)
        low, high = (middle, high) if used(ranks(middle)) <= budget else (low, middle)
    chosen = ranks(low)
    left = budget - used(chosen)
    for name in sorted(cost, key=lambda name: (chosen[name] - low * scale_of[name], name)):
        if cost[name] <= left and chosen[name] < limit[name] and scale_of[name] > 0.0:
            chosen[name] += 1
            left -= cost[name]
    return {name: rank for name, rank in chosen.items() if rank > 0}


def plan(request: BaselineRequest, sizes: Mapping[str, tuple[str, int]], **lora: Any) -> Choice:
    """The choice of these methods and sizes by layer, for the request's model.

    Args:
        request: says which seed, scale, task and head.
        sizes: layers that are not in it are left alone.
        lora: fields of ``LoraSettings``.
    """
    return Choice.of(
        {layer.name: sizes.get(layer.name, ("none", 0)) for layer in request.spec.layers},
        seed=request.seed,
        lora=LoraSettings(**{"alpha_over_r": request.alpha_over_r, **lora}),
        head_modules=request.facts.heads,
        task=request.facts.task or "",
    )


def planned(
    request: BaselineRequest, choice: Choice, factors: Mapping[str, torch.Tensor] | None = None, note: str = ""
) -> Prepared:
    """``choice`` in the request's model, to be trained and kept as it is."""
    model = apply(request.model, choice, factors=factors, facts=request.facts)
    params = trained_params(model, request.facts)
    return Prepared(model, params, choice, lambda tuned: Finished(tuned, params, choice), note=note)


def trained_params(model: torch.nn.Module, facts: ModelFacts) -> int:
    """Parameters that require gradients, the task head left out."""
    heads = tuple(f".{head}." for head in facts.heads)
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(head in f".{name}" for head in heads)
    )
