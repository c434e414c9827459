"""The Python code that turns a manifest into a model ready to train, for people to paste."""

from __future__ import annotations

from pathlib import Path

from layerlens.cli.output import short
from layerlens.models import LORA, Manifest


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
    imports, base = _base_model(manifest, model)
    methods = {row.method for row in manifest.allocations} - {"none"}
    if methods == {LORA} and peft_directory is not None:
        standard = []
        imports = ["from peft import PeftModel", *imports]
        tuned = f"PeftModel.from_pretrained(base, {short(peft_directory)!r}, is_trainable=True)"
    else:
        standard = ["from pathlib import Path", ""]
        measured = manifest.lora.is_measured and LORA in methods
        names = "apply, read_factors" if measured else "apply"
        own = ["from layerlens.manifest import read_manifest", f"from layerlens.tuning import {names}"]
        imports = [*imports, "", *own] if imports else own
        tuned = f"apply(base, read_manifest(Path({short(path)!r})))"
        if measured:  # LoRA's first A is in the exported adapter
            peft = short(peft_directory or path.parent / "peft")
            imports += ["", f"manifest = read_manifest(Path({short(path)!r}))"]
            tuned = f"apply(base, manifest, factors=read_factors(Path({peft!r}), manifest))"
    comment = "# Now train `model` as you would any other: Trainer, TRL, or your own loop."
    return "\n".join([*standard, *imports, "", f"base = {base}", f"model = {tuned}", comment, ""])


def _base_model(manifest: Manifest, model: str | None) -> tuple[list[str], str]:
    """The imports and the expression that load the base model."""
    from layerlens.sources import LoadRequest

    facts = manifest.model
    name = model or facts.name_or_path
    if not name:
        return [], "...  # your model: the one that was measured"
    request = LoadRequest(name, facts.task or "", facts.labels or (), weights=facts.weights)
    return request.source.snippet(request)
