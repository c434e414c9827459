"""The base model that a manifest was made for, loaded again."""

from __future__ import annotations

from pathlib import Path

from layerlens.exceptions import ManifestError
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.models import Manifest
from layerlens.registry import TASKS
from layerlens.sources import LoadRequest, load_pretrained


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
            f"the base model is made by Python code that the manifest names ({reference}); if you trust it, say so "
            f"with --model {reference}"
        )
    return reference


def load_base(manifest: Manifest, model: str | None = None, base_dir: Path | None = None) -> PretrainedModel:
    """The manifest's base model with its tokenizer or image processor, as it was profiled.

    Args:
        manifest: names the model, its task, its classes and the seed of a new head.
        model: name or path to load instead.
        base_dir: folder that relative paths start from.

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
    )
