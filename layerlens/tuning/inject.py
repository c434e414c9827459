"""Putting a choice into a model: each method puts in its options, all else is frozen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ManifestError
from layerlens.integrations.torch_modules import find_module
from layerlens.methods import injected_sizes
from layerlens.models import Choice, Manifest, ModelFacts
from layerlens.registry import METHODS
from layerlens.tuning.fit import fitting_choice
from layerlens.tuning.generators import attach_generator, load_generator
from layerlens.tuning.undo import keep_statistics, note_before

if TYPE_CHECKING:
    import torch


def apply(
    model: torch.nn.Module,
    given: Choice | Manifest,
    *,
    factors: Mapping[str, torch.Tensor] | None = None,
    facts: ModelFacts | None = None,
    check_fingerprint: bool = True,
) -> torch.nn.Module:
    """Make ``model`` ready to train as a choice says; no logit changes until a step is taken.

    LoRA, adapters, prefixes and the task head are trainable, every other parameter is frozen, and so are the running
    statistics of batch normalisation. The new weights depend on the choice's seed and the layers' names only; LoRA
    starts exactly as in the exported adapter directory. ``unapply`` takes everything out again.

    Args:
        model: a freshly loaded base model; it is changed in place.
        given: what to put in; of a manifest its choice, and its weights and parameter counts are checked too.
        factors: LoRA's first A by layer, where ``lora.initialization`` is not "default": from ``read_factors`` or
            ``initial_factors``.
        facts: what ``save`` is to note of the base model, where a choice is given; a manifest says it itself.
        check_fingerprint: refuse weights other than those that were profiled. False for the same model in another
            precision, or after further training.

    Returns:
        A PEFT model around ``model`` if there is a LoRA row, else ``model`` itself.

    Raises:
        ManifestError: the choice does not fit; the model is then unchanged.
    """
    if injected_sizes(model):
        raise ManifestError("the model already has LoRA layers, adapters or prefixes; load the base model afresh")
    choice, known = fitting_choice(model, given, check_fingerprint=check_fingerprint)
    methods = [METHODS[name] for name in METHODS if choice.of_method(name)]
    put_in = [method.prepare(model, choice, factors) for method in methods]
    wrapped = any(method.wraps for method in methods)
    names = choice.head_modules
    heads = [find_module(model, name) for name in names]

    generator = choice.lora.generator
    if generator:
        load_generator(generator)  # an unknown one is refused before anything is changed

    # PEFT trains a copy of the head; without it the head itself is trained.
    in_place = () if wrapped else [name for name, _ in model.named_parameters() if name.startswith(_below(names))]
    note_before(model, facts or known, in_place)
    keep_statistics(model, heads)
    tuned = model.requires_grad_(False)
    for put in put_in:
        tuned = put(tuned)
    if not wrapped:
        for head in heads:
            head.requires_grad_(True)
        _let_gradients_into_checkpoints(model)
    if generator:
        attach_generator(tuned, generator, seed=choice.seed)
    return tuned


def _let_gradients_into_checkpoints(model: Any) -> None:
    """Reentrant checkpoints pass no gradient on where no input has one; PEFT and text models see to it themselves."""
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if checkpointing and not getattr(model, "_require_grads_hooks", None):
        model.enable_input_require_grads()


def _below(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name}." for name in names)
