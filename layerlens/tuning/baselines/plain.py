"""Choices for a request, and baselines that one choice says whole: all weights, the head, one size, a hypernetwork."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ConfigurationError
from layerlens.methods import trainable_params
from layerlens.models import LORA, Choice, LayerSpec, LoraSettings, ModelFacts
from layerlens.models.model_spec import NO_MATRIX
from layerlens.tuning.baselines.baseline import Baseline, BaselineRequest, Finished, Prepared
from layerlens.tuning.generators import attach_generator, finish_generator
from layerlens.tuning.inject import apply, note_before

if TYPE_CHECKING:
    import torch

GENERATOR = "hyperlora"


def layers_with(request: BaselineRequest, method: str, *, dense: bool = False) -> tuple[LayerSpec, ...]:
    """Layers that offer ``method``, without grouped convolutions, experts and embeddings; with ``dense``, Linear ones.

    Raises:
        ConfigurationError: there are none.
    """
    from layerlens.integrations.transformers import is_dense

    able = [layer for layer in request.spec.layers if method in layer.methods]
    layers = tuple(layer for layer in able if layer.layer_type not in NO_MATRIX)
    if others := [layer.name for layer in able if layer.layer_type in NO_MATRIX]:
        warnings.warn(
            f"baseline: {len(others)} stacked experts or embeddings ({others[0]} ...) stay unchanged; baselines are "
            "published for layers with one matrix each",
            stacklevel=2,
        )
    if method == LORA:  # ranks of grouped convolutions are multiples of their groups, which no rule here knows
        layers = tuple(layer for layer in layers if getattr(request.model.get_submodule(layer.name), "groups", 1) == 1)
    if dense:
        layers = tuple(layer for layer in layers if is_dense(request.model.get_submodule(layer.name)))
    if not layers:
        raise ConfigurationError(f"baseline: no layer of this model can take {method}{' as a Linear' * dense}")
    return layers


def uniform_size(layers: Sequence[LayerSpec], method: str, budget: int) -> int:
    """The largest size with which ``method`` on all ``layers`` stays within ``budget``.

    Raises:
        ConfigurationError: size 1 is too much; the message has the smallest budget that would do.
    """

    def cost(size: int) -> int:
        return sum(trainable_params(layer, method, size) for layer in layers)

    least, slope = cost(1), cost(2) - cost(1)
    if least > budget:
        raise ConfigurationError(
            f"baseline: {method} of size 1 on {len(layers)} layers trains {least:,} parameters, more than the "
            f"budget of {budget:,}; give at least {least:,}"
        )
    largest = min(min(layer.n_in, layer.n_out) for layer in layers) if method == LORA else math.inf
    return int(min(largest, 1 + (budget - least) // slope))


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


def full_fine_tuning(request: BaselineRequest) -> Prepared:
    """Every parameter requires gradients. It has no budget; other methods are compared with it."""
    note_before(request.model, request.facts, whole=True)
    request.model.requires_grad_(True)
    params = trained_params(request.model, request.facts)
    return Prepared(
        request.model, params, None, lambda model: Finished(model, params, None), note="trains all weights, no budget"
    )


def head_only(request: BaselineRequest) -> Prepared:
    """No layer is adapted: the task head alone, on frozen features.

    Raises:
        ConfigurationError: the model has no task head of its own.
    """
    if not request.facts.heads:
        raise ConfigurationError("baseline head-only: this model has no new task head, so nothing would be trained")
    return planned(request, plan(request, {}), note="adds nothing to the layers")


def one_size(method: str) -> Callable[[BaselineRequest], Prepared]:
    """The largest size of ``method`` that all layers that take it can have within the budget."""

    def prepare(request: BaselineRequest) -> Prepared:
        layers = layers_with(request, method)
        size = uniform_size(layers, method, request.budget)
        return planned(request, plan(request, {layer.name: (method, size) for layer in layers}))

    return prepare


def hypernetwork(request: BaselineRequest) -> Prepared:
    """The uniform rank of the budget on every layer, generated by the built-in generator while it trains.

    Ordinary LoRA of the budget's size is kept.
    """
    layers = layers_with(request, LORA)
    rank = uniform_size(layers, LORA, request.budget)
    choice = plan(request, {layer.name: (LORA, rank) for layer in layers})
    model = attach_generator(apply(request.model, choice, facts=request.facts), GENERATOR, seed=request.seed)
    size = choice.trainable_params(request.spec)

    def finish(trained: torch.nn.Module) -> Finished:
        return Finished(finish_generator(trained), size, choice)

    note = f"trains the generator, keeps {size:,} LoRA parameters"
    return Prepared(model, trained_params(model, request.facts), choice, finish, note=note)


FULL = Baseline("every weight is trained", full_fine_tuning)
HEAD_ONLY = Baseline("the task head alone", head_only)
ADAPTER_ONLY = Baseline("one adapter width after attention and FFN outputs (Houlsby et al. 2019)", one_size("adapter"))
PREFIX_ONLY = Baseline("one gated prefix length in every attention block", one_size("prefix"))
HYPERNETWORK = Baseline("LoRA generated from layer embeddings (HyperLoRA)", hypernetwork)
