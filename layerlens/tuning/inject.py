"""Adds a choice to a model, removes it again, or merges it into the weights. Everything else is frozen meanwhile."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ManifestError
from layerlens.integrations.checkpointing import checkpoint_blocks
from layerlens.integrations.peft import TOKEN_ROWS, base_of, has_trained_rows
from layerlens.integrations.torch_modules import find_module, learns_in_forward
from layerlens.integrations.transformers import blocks_to_checkpoint
from layerlens.methods import drop_hooks, injected_sizes
from layerlens.models import LORA, Choice, Manifest, ModelFacts
from layerlens.registry import METHODS
from layerlens.tuning.base_model import fitting_choice
from layerlens.tuning.generators import attach_generator, load_generator
from layerlens.tuning.generators.generator import finish_generator
from layerlens.tuning.task_head import Head, begin_head, check_head

if TYPE_CHECKING:
    import torch


def apply(
    model: torch.nn.Module,
    given: Choice | Manifest,
    *,
    factors: Mapping[str, torch.Tensor] | None = None,
    head: Head | None = None,
    facts: ModelFacts | None = None,
    check_fingerprint: bool = True,
) -> torch.nn.Module:
    """Add a choice to ``model`` and make it ready to train. No logit changes before the first training step.

    LoRA, adapters, prefixes and the task head require gradients. All other parameters, and the running statistics of
    batch normalisation, are frozen. The new weights depend only on the choice's seed and the layers' names, so LoRA
    starts exactly as in the exported adapter directory. ``unapply`` removes everything again.

    Args:
        model: a freshly loaded base model, changed in place.
        given: the choice, or the manifest that holds it. With a manifest, the weights and the number of parameters are
            checked too.
        factors: layer -> LoRA's first A, from ``read_factors`` or ``initial_factors``. Required if
            ``lora.initialization`` is not "default".
        head: name -> first weights of the task head, from ``read_head``; by default, the head of ``model``. The outputs
            are those of the model with this head.
        facts: what ``save`` records about the base model if ``given`` is a choice. A manifest holds these facts itself.
        check_fingerprint: refuse weights that differ from the measured ones. Set False for the same model in another
            precision, or after further training.

    Returns:
        a PEFT model around ``model`` if the choice has LoRA or another method of PEFT, else ``model`` itself.

    Raises:
        ManifestError: the choice does not fit the model, which is then unchanged.
    """
    if injected_sizes(model):
        raise ManifestError("the model already has LoRA layers, adapters or prefixes; load the base model afresh")
    choice, known = fitting_choice(model, given, check_fingerprint=check_fingerprint)
    wrapped = bool(choice.peft_method)
    names = {option.method for option in choice.chosen} | ({choice.peft_method} if wrapped else set())
    names -= {option.method for option in choice.copied_options}
    methods = [METHODS[name] for name in METHODS if name in names]
    methods.sort(key=lambda method: not method.wraps)  # PEFT freezes all that is there before it
    put_in = [method.prepare(model, choice, factors) for method in methods]
    heads = [find_module(model, name) for name in choice.head_modules]
    check_head(model, head or {})

    generator = choice.lora.generator
    if generator:
        load_generator(generator)  # an unknown one is refused before anything is changed

    # PEFT trains a copy of the head; without it the head itself is trained.
    in_place = (
        ()
        if wrapped
        else [name for name, _ in model.named_parameters() if name.startswith(_below(choice.head_modules))]
    )
    note_before(model, facts or known, in_place)
    keep_statistics(model, heads)
    tuned = model.requires_grad_(False)
    for put in put_in:
        tuned = put(tuned)
    if not wrapped:
        for module in heads:
            module.requires_grad_(True)
        _let_gradients_into_checkpoints(model)
    if heads and head:
        begin_head(tuned, head)
    if generator:
        attach_generator(tuned, generator, seed=choice.seed)
    if choice.checkpointed:
        remember_checkpoints(tuned)
        checkpoint_blocks(tuned, choice.checkpointed)
    return tuned


def remember_checkpoints(tuned: torch.nn.Module) -> None:
    """Note which modules checkpoint their activations, for ``unapply``."""
    base, before = base_of(tuned), before_of(tuned)
    assert before is not None
    before.checkpointing = frozenset(
        name for name, module in base.named_modules() if getattr(module, "gradient_checkpointing", False) is True
    )


def _let_gradients_into_checkpoints(model: Any) -> None:
    """Reentrant checkpoints pass no gradient on where no input has one; PEFT and text models see to it themselves.

    Others do, so that the backward pass ends at the lowest adapted layer.
    """
    if checkpoints_reenter(model) and not getattr(model, "_require_grads_hooks", None):
        model.enable_input_require_grads()


def checkpoints_reenter(model: torch.nn.Module) -> bool:
    """Whether a module checkpoints its activations in torch's reentrant way, which needs inputs with gradients."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) is True:
            function: Any = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(function, "keywords", {}).get("use_reentrant", True):
                return True
    return False


def stop_at_the_lowest(model: torch.nn.Module) -> None:
    """Take back gradients of the embeddings' output, which transformers asks for when it checkpoints: the backward pass
    would go through all frozen blocks below the lowest adapted one. Reentrant checkpoints need them.
    """
    base: Any = base_of(model)
    if getattr(base, "_require_grads_hooks", None) and not checkpoints_reenter(base):
        base.disable_input_require_grads()


def _below(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name}." for name in names)


NOTE = "_layerlens_before"


@dataclass
class Before:
    """The base model as it was.

    Args:
        trained: names of the parameters that required gradients.
        weights: copies, by name, of the parameters that are trained in place.
        facts: which weights these are.
        checkpointing: names of the modules that checkpointed their activations; None where that was left as it was.
        whole: every parameter is trained in place, and nothing was copied.
    """

    trained: frozenset[str]
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    facts: ModelFacts = field(default_factory=ModelFacts)
    whole: bool = False
    checkpointing: frozenset[str] | None = None


def note_before(base: torch.nn.Module, facts: ModelFacts, in_place: Sequence[str] = (), *, whole: bool = False) -> None:
    """Remember ``base`` before it is changed; ``in_place`` are the parameters to copy."""
    parameters = dict(base.named_parameters())
    setattr(
        base,
        NOTE,
        Before(
            frozenset(name for name, parameter in parameters.items() if parameter.requires_grad),
            {name: parameters[name].detach().clone() for name in in_place},
            facts,
            whole,
        ),
    )


def before_of(model: torch.nn.Module) -> Before | None:
    """What ``note_before`` remembered; None for a model that LayerLens has not changed."""
    return getattr(base_of(model), NOTE, None)


def unapply(model: torch.nn.Module) -> torch.nn.Module:
    """Remove everything that ``apply`` or ``load`` added, and return the base model as it was before.

    Modules, weights and ``requires_grad`` are the same as before.

    Args:
        model: the result of ``apply`` or ``load``, trained or not. Do not use it afterwards.

    Returns:
        the base model.

    Raises:
        ManifestError: there is nothing to remove, LoRA is merged into the weights, or all weights were trained.
    """
    import torch

    base, before = base_of(model), before_of(model)
    if before is None:
        raise ManifestError(f"this {type(model).__name__} holds nothing that layerlens.tuning.apply or load added")
    if before.whole:
        raise ManifestError("full fine-tuning has changed the weights themselves; load the base model again")
    if base is not model:
        finish_generator(model)
    for name in METHODS:
        METHODS[name].remove(model)
    release_statistics(base)
    if before.checkpointing is not None:
        for name, block in blocks_to_checkpoint(base).items():
            one: Any = block
            one.gradient_checkpointing = name in before.checkpointing
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name in before.weights:
                parameter.copy_(before.weights[name])
            parameter.requires_grad_(name in before.trained)
            parameter.grad = None
    delattr(base, NOTE)
    return base


def _tied(model: torch.nn.Module, layers: Collection[str]) -> str:
    """Which adapted layer has the weight of another module, which merging would change, too; "" for none."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dim() > 1:
                owners.setdefault(id(parameter), []).append(name.removesuffix(".base_layer"))
    for names in owners.values():
        for layer in layers:
            if len(names) > 1 and (found := [name for name in names if f".{name}".endswith(f".{layer}")]):
                other = next(name for name in names if name != found[0])
                return (
                    f"{layer} has the same weight as {other.removeprefix('base_model.model.')}, which would change, too"
                )
    return ""


def merge(model: torch.nn.Module) -> torch.nn.Module:
    """Merge LoRA and the trained task head into the base model, which is then as fast as before.

    Logits agree with those of ``model`` up to the rounding of W + (alpha/r)·B·A in the precision of W. Quantized
    weights are rounded coarsely. A warning gives the share of the training that this rounding removes.

    Args:
        model: the result of ``apply`` or ``load``. Do not use it afterwards.

    Returns:
        a frozen model of the base model's class, which ``save_pretrained`` writes in full.

    Raises:
        ManifestError: there is no LoRA, a LoRA weight is not finite, or there are adapters or prefixes, which cannot be
            merged. ``model`` is then unchanged.
    """

    there = injected_sizes(model)
    others = {layer: method for layer, (method, _) in there.items() if not METHODS[method].mergeable}
    if others:
        names = [f"{method} on {layer}" for layer, method in others.items()]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise ManifestError(
            f"cannot be merged: {', '.join(names[:4])}{more}. An adapter or prefix does not change a weight; keep the "
            "model unmerged (layerlens.tuning.save and load), or choose only LoRA (optimization.methods: [lora])"
        )
    methods = [METHODS[name] for name in dict.fromkeys(method for method, _ in there.values())]
    if not methods and has_trained_rows(model):
        methods = [METHODS[LORA]]
    if not methods:
        raise ManifestError(f"this {type(model).__name__} has no LoRA layers, so there is nothing to merge")
    for method in methods:
        if reason := method.why_not_mergeable(model):
            raise ManifestError(f"cannot be merged: {reason}; keep the model unmerged (layerlens.tuning.save and load)")
    if LORA in {method.name for method in methods} and (reason := _tied(model, there)):
        raise ManifestError(f"cannot be merged: {reason}; keep the model unmerged (layerlens.tuning.save and load)")
    finish_generator(model)
    for name, parameter in model.named_parameters():
        marks = (*(method.parameter_mark for method in methods), TOKEN_ROWS)
        if any(mark in name for mark in marks) and not bool(parameter.isfinite().all()):
            raise ManifestError(f"cannot be merged: {name} has values that are not finite")
    merged = model
    for method in methods:
        if not (method.wraps and base_of(merged) is merged):  # one of PEFT's has merged all of PEFT's
            merged = method.merge(merged)
    release_statistics(merged)
    if before_of(merged) is not None:
        delattr(merged, NOTE)
    return merged.requires_grad_(False)


def keep_statistics(base: torch.nn.Module, heads: Sequence[torch.nn.Module] = ()) -> None:
    """Let frozen norms use what they have learnt in training too (running statistics, singular vectors), and keep it.

    These are weights of the frozen model; updated, they would be in no adapter file.
    """
    trained = {id(module) for head in heads for module in head.modules()}
    for module in base.modules():
        if learns_in_forward(module) and id(module) not in trained:
            module.register_forward_pre_hook(_in_evaluation_mode, prepend=True)


def release_statistics(base: torch.nn.Module) -> None:
    """Undo ``keep_statistics``."""
    for module in base.modules():
        drop_hooks(module, _in_evaluation_mode)


def _in_evaluation_mode(module: torch.nn.Module, args: Any) -> None:
    module.training = False
