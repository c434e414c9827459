"""The base model that a manifest was made for, loaded again."""

from __future__ import annotations

from pathlib import Path

from layerlens.exceptions import ManifestError
from layerlens.integrations.transformers import PretrainedModel, load_pretrained
from layerlens.models import Manifest
from layerlens.registry import TASKS


def base_reference(manifest: Manifest, model: str | None) -> str:
    """What the base model is loaded by: ``model``, or else what the manifest names.

    Raises:
        ManifestError: the manifest lacks what loading needs, or names Python code, which runs only when the user says
            so.
    """
    told = {**manifest.model, "name_or_path": model or manifest.model.get("name_or_path")}
    task = TASKS.get(told.get("task"))
    for key in ("name_or_path", "task", *(("labels",) if task is not None and task.classes else ())):
        if not told.get(key):
            raise ManifestError(
                f"the manifest has no model.{key}, so its base model cannot be loaded; "
                "`layerlens run` writes manifests that have it"
            )
    reference = str(told["name_or_path"])
    if reference.startswith("factory:") and model is None:
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
    weights = manifest.model.get("weights")
    return load_pretrained(
        reference,
        str(manifest.model["task"]),
        [str(label) for label in manifest.model.get("labels") or ()],
        seed=manifest.choice.seed,
        base_dir=base_dir,
        dtype=str(manifest.model.get("dtype") or "float32"),
        weights=None if weights is None else str(weights),
    )
