"""Putting a choice into a model: LoRA by PEFT, adapters and prefixes by our own modules, all else frozen."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ManifestError
from layerlens.integrations.peft import injected_ranks, lora_config, zero_step_tensors
from layerlens.integrations.torch_modules import find_module
from layerlens.models import Choice, Manifest, ModelFacts
from layerlens.tuning.fit import fitting_choice
from layerlens.tuning.generators import attach_generator, load_generator
from layerlens.tuning.undo import note_before

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig


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
    from layerlens.tuning.modules import attach, attached, keep_statistics, new_module

    if attached(model) or injected_ranks(model):
        raise ManifestError("the model already has LoRA layers, adapters or prefixes; load the base model afresh")
    choice, known = fitting_choice(model, given, check_fingerprint=check_fingerprint)
    own = choice.other_options
    targets = [find_module(model, option.layer) for option in own]
    added = [new_module(model, target, option, choice.seed) for option, target in zip(own, targets, strict=True)]
    names = choice.head_modules
    heads = [find_module(model, name) for name in names]
    has_lora = bool(choice.lora_options)
    tensors = zero_step_tensors(choice, model, factors) if has_lora else {}
    config = lora_config(choice, model) if has_lora else None

    generator = choice.lora.generator
    if generator:
        load_generator(generator)  # an unknown one is refused before anything is changed

    # PEFT trains a copy of the head; without it the head itself is trained.
    in_place = () if has_lora else [name for name, _ in model.named_parameters() if name.startswith(_below(names))]
    note_before(model, facts or known, in_place)
    keep_statistics(model, heads)
    tuned = model.requires_grad_(False) if config is None else _with_lora(model, choice, config, tensors)
    for target, module in zip(targets, added, strict=True):
        attach(model, target, module)
    if config is None:
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


def _with_lora(
    model: torch.nn.Module, choice: Choice, config: LoraConfig, tensors: Mapping[str, torch.Tensor]
) -> torch.nn.Module:
    import torch
    from peft import get_peft_model

    config.base_model_name_or_path = None  # PEFT fills in where this very model came from
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT 0.21 still reads a name of gradient checkpointing that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        tuned = get_peft_model(model, config)  # draws weights of its own, which are replaced below
    expected = choice.lora_ranks()
    if injected_ranks(tuned) != expected:
        missed = sorted(expected.keys() - injected_ranks(tuned).keys()) or sorted(expected)
        raise ManifestError(
            f"PEFT did not give these layers their rank: {', '.join(missed)}; are they in the task head?"
        )
    layers = dict(tuned.named_modules())
    with torch.no_grad():
        for key, tensor in tensors.items():
            layer, _, part = key.removesuffix(".weight").rpartition(".")
            getattr(layers[layer], part)["default"].weight.copy_(tensor)
    return tuned
