"""The base model that a manifest was made for: loaded again, and compared with the manifest before it is changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from layerlens.exceptions import ManifestError
from layerlens.integrations.experts import stack_at
from layerlens.integrations.pretrained import PretrainedModel, not_of_checkpoint, weights_fingerprint
from layerlens.integrations.quantized import parameter_count
from layerlens.integrations.torch_modules import find_module
from layerlens.integrations.transformers import embedding_rows
from layerlens.models import Choice, Manifest, ModelFacts, Option, choice_of
from layerlens.registry import METHODS, TASKS
from layerlens.sources import LoadRequest, load_pretrained

if TYPE_CHECKING:
    import torch


def base_reference(manifest: Manifest, model: str | None) -> str:
    """What the base model is loaded by: ``model``, or else what the manifest names.

    Raises:
        ManifestError: the manifest lacks what loading needs, or names Python code, which runs only when the user says
            so.
    """
    facts = manifest.model
    reference, task = model or facts.name_or_path or "", TASKS.get(facts.task or "")
    needed: dict[str, object] = {"name_or_path": reference, "task": facts.task}
    if task is not None and task.classes:
        needed["labels"] = facts.labels
    for key, value in needed.items():
        if not value:
            raise ManifestError(
                f"the manifest has no model.{key}, so its base model cannot be loaded; "
                "`layerlens run` writes manifests that have it"
            )
    wanted = LoadRequest(reference)
    if wanted.source.trust(wanted).code and model is None:
        raise ManifestError(
            f"Python code that the manifest names creates the base model ({reference}); if you trust it, pass --model "
            f"{reference}"
        )
    return reference


def load_base(
    manifest: Manifest, model: str | None = None, base_dir: Path | None = None, *, trust_remote_code: bool = False
) -> PretrainedModel:
    """The manifest's base model with its tokenizer or image processor, as it was profiled.

    Args:
        manifest: names the model, its task, its classes and the seed of a new head.
        model: name or path to load instead.
        base_dir: folder that relative paths start from.
        trust_remote_code: whether Python code beside the weights may run; a manifest cannot say so.

    Raises:
        ManifestError: see ``base_reference``.
        ModelNotFoundError: the model cannot be found or read.
    """
    reference = base_reference(manifest, model)
    facts = manifest.model
    return load_pretrained(
        reference,
        facts.task or "",
        facts.labels or (),
        seed=manifest.choice.seed,
        base_dir=base_dir,
        dtype=facts.dtype or "float32",
        weights=facts.weights,
        trust_remote_code=trust_remote_code,
        quantization=facts.quantization,
        tokens=facts.token_training,
    )


def fitting_choice(
    model: torch.nn.Module, given: Choice | Manifest, *, check_fingerprint: bool = True
) -> tuple[Choice, ModelFacts]:
    """The choice in ``given``, which fits ``model``, and what a manifest says of its base model.

    Raises:
        ManifestError: a layer that the model does not have; of a manifest also: other weights (where
            ``check_fingerprint``), or other numbers of parameters than it counted with.
    """
    choice = choice_of(given)
    check_names(model, choice)
    if not isinstance(given, Manifest):
        return choice, ModelFacts(head_modules=choice.head_modules)
    if check_fingerprint:
        check_weights(model, given.model)
    check_costs(model, given, choice.chosen)
    return choice, given.model


def check_names(model: torch.nn.Module, choice: Choice) -> None:
    """Refuse a choice that names a module the model does not have, be it of a layer that is left alone.

    Raises:
        ManifestError: with the nearest known names; or a layer is part of the task head, which is trained anyway.
    """
    for name in (*choice.head_modules, *(option.layer for option in choice.options)):
        if stack_at(model, name) is None:
            find_module(model, name)
    inside = tuple(name + "." for name in choice.head_modules)
    for option in choice.chosen:
        if option.layer in choice.head_modules or option.layer.startswith(inside):
            raise ManifestError(
                f"{option.layer}: is in the task head, which is trained in full; its method must be none"
            )


def check_costs(model: torch.nn.Module, manifest: Manifest, options: Sequence[Option]) -> None:
    """Refuse a manifest that was made for a model of another shape: ``options`` would train other numbers there.

    Raises:
        ManifestError: the layer, what it trains here, and what the manifest says.
    """
    costs = {row.layer: row.cost for row in manifest.allocations}
    for option in options:
        trained, words = METHODS[option.method].params_in(model, option)
        if trained != costs[option.layer]:
            raise ManifestError(
                f"{option.layer}: {words} trains {trained} parameters, the manifest says {costs[option.layer]}; it was "
                "made for a model of another shape"
            )


def check_weights(model: torch.nn.Module, facts: ModelFacts, source: str = "the manifest") -> None:
    """Refuse a model whose weights are not those that ``facts`` describes.

    Modules with new parameters are left out: these are random in every freshly loaded model. Facts without a
    fingerprint (written without the model at hand) fit any weights.

    Raises:
        ManifestError: the number of parameters or the fingerprint differs.
    """
    expected, tokens = facts.fingerprint, facts.token_training
    if tokens is not None and (rows := embedding_rows(model)) is not None and rows < tokens.rows:
        raise ManifestError(
            f"{source} trains rows of tokens without embeddings in this model: it has {rows} rows and needs "
            f"{tokens.rows}; call model.resize_token_embeddings({tokens.rows}) first"
        )
    if not expected:
        return
    counted, total = facts.total_params, parameter_count(model)
    if counted and counted != total:
        raise ManifestError(f"{source} was made for a model of {counted:,} parameters, this one has {total:,}")
    new = not_of_checkpoint(model, facts.new_heads, facts.new_parameters or ())
    found = weights_fingerprint(model, new, tokens)
    if expected not in (found, weights_fingerprint(model)):
        raise ManifestError(
            f"these are not the weights that {source} was made for: fingerprint {found[:12]}… instead of "
            f"{expected[:12]}…; load "
            f"{facts.name_or_path!r} in the precision it was profiled in, or profile this model"
        )
