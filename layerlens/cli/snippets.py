"""The Python code that turns a manifest into a model ready to train, for people to paste."""

from __future__ import annotations

from pathlib import Path

from layerlens.cli.output import short
from layerlens.models import Manifest


def python_snippet(manifest: Manifest, path: Path, peft_directory: Path | None, model: str | None = None) -> str:
    """Code that loads the base model and makes it ready to train.

    Plain PEFT where the manifest has LoRA only and its adapter directory is there; else LayerLens, which can inject
    adapters and prefixes too.

    Args:
        manifest: the plan.
        path: its file.
        peft_directory: its exported LoRA, if there is one.
        model: the base model, if it is not the one that the manifest names.
    """
    lines = _base_model(manifest, model)
    methods = {row.method for row in manifest.allocations} - {"none"}
    if methods == {"lora"} and peft_directory is not None:
        lines = [
            "from peft import PeftModel",
            *lines,
            f"model = PeftModel.from_pretrained(base, {short(peft_directory)!r}, is_trainable=True)",
        ]
    else:
        lines = [
            "from pathlib import Path",
            "",
            "from layerlens.manifest import read_manifest",
            "from layerlens.tuning import apply",
            *lines,
            f"model = apply(base, read_manifest(Path({short(path)!r})))",
        ]
    return "\n".join([*lines, "# Now train `model` as you would any other: Trainer, TRL, or your own loop.", ""])


def _base_model(manifest: Manifest, model: str | None) -> list[str]:
    name = model or manifest.model.get("name_or_path")
    if not name or manifest.model.get("task") != "sequence-classification":
        return ["", f"base = ...  # your model: {name or 'the one that was measured'}"]
    loader = "from transformers import AutoModelForSequenceClassification"
    source, imports = repr(str(name)), [loader]
    if str(name).startswith("package:"):
        imports = [f"from {str(name).removeprefix('package:')} import get_model_path", loader]
        source = "get_model_path()"
    labels = len(manifest.model.get("labels") or [])
    count = f", num_labels={labels}" if labels else ""
    return [*imports, "", f"base = AutoModelForSequenceClassification.from_pretrained({source}{count})"]
