"""The zero-step adapter directory: what any PEFT trainer starts from, without LayerLens and without changing a logit.

``peft/`` holds the LoRA rows in PEFT's own files, ``layerlens_modules.safetensors`` the adapters and prefixes, which
PEFT does not have. ``peft/`` has no weights of the task head on purpose: the head of a freshly loaded base model is
random, so any head written here would change its logits, and PEFT refuses a file that lacks the head when its
configuration trains one (a KeyError in 0.21). The README beside the files says how to train the head too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from layerlens.exceptions import ManifestError
from layerlens.integrations.peft import (
    TASK_TYPES,
    adapter_config_json,
    lora_config,
    lora_rows,
    manifest_seed,
    zero_step_tensors,
)
from layerlens.integrations.torch_modules import find_module
from layerlens.integrations.transformers import WITH_CLASSES, load_model
from layerlens.models import Manifest
from layerlens.tuning.fit import check_names, check_weights
from layerlens.tuning.storage import modules_bytes
from layerlens.utils.atomic import staged_directory

if TYPE_CHECKING:
    import torch

PEFT_DIRECTORY, MODULES_FILE = "peft", "layerlens_modules.safetensors"


def export_adapter(manifest: Manifest, model: torch.nn.Module, directory: Path) -> dict[str, Path]:
    """Write the zero-step adapter of ``manifest`` below ``directory``; the same manifest gives the same bytes.

    What an earlier export left there is replaced, or removed where this manifest has none of that kind.

    Args:
        manifest: its LoRA rows go to ``directory``/peft, its adapters and prefixes to
            ``directory``/layerlens_modules.safetensors.
        model: the base model, for its module names and shapes; it is not changed.
        directory: created if it is not there.

    Returns:
        The path of each thing written, under "peft" and "modules".

    Raises:
        ManifestError: the manifest does not fit the model; nothing is then written.
        OutputError: the directory cannot be written.
    """
    check_names(model, manifest)
    directory = Path(directory)
    peft_files, modules = _peft_files(manifest, model), _modules(manifest, model)
    written: dict[str, Path] = {}
    with staged_directory(directory, owned=(PEFT_DIRECTORY, MODULES_FILE)) as staging:
        if peft_files:
            (staging / PEFT_DIRECTORY).mkdir()
            for name, content in peft_files.items():
                (staging / PEFT_DIRECTORY / name).write_bytes(content)
            written["peft"] = directory / PEFT_DIRECTORY
        if modules:
            (staging / MODULES_FILE).write_bytes(modules_bytes(modules, {}))
            written["modules"] = directory / MODULES_FILE
    return written


def apply_to_directory(manifest: Manifest, model: str | None, output: Path) -> dict[str, Path]:
    """Load the manifest's base model and write its zero-step adapter below ``output``.

    Args:
        manifest: what to export.
        model: name or path of the base model; the one that the manifest names when None.
        output: directory, created if it is not there.

    Returns:
        See ``export_adapter``.

    Raises:
        ManifestError: the manifest does not say which model, or was made for other weights or another shape.
        ModelNotFoundError: the model cannot be found or read.
        OutputError: the directory cannot be written.
    """
    told = {**manifest.model, "name_or_path": model or manifest.model.get("name_or_path")}
    needed = ("name_or_path", "task", *(("labels",) if told.get("task") in WITH_CLASSES else ()))
    for key in needed:
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
    base = load_model(
        reference,
        str(told["task"]),
        list(told.get("labels") or []),
        seed=manifest_seed(manifest),
        weights=None if told.get("weights") is None else str(told["weights"]),
    )
    check_weights(base, manifest)
    return export_adapter(manifest, base, output)


def _peft_files(manifest: Manifest, model: torch.nn.Module) -> dict[str, bytes]:
    from safetensors.torch import save

    if not lora_rows(manifest):
        return {}
    return {
        "adapter_config.json": adapter_config_json(lora_config(manifest, model, train_head=False)).encode(),
        "adapter_model.safetensors": save(zero_step_tensors(manifest, model), metadata={"format": "pt"}),
        "README.md": _card(manifest).encode(),
    }


def _modules(manifest: Manifest, model: torch.nn.Module) -> dict[str, tuple[str, torch.nn.Module]]:
    from layerlens.tuning.modules import new_module

    seed = manifest_seed(manifest)
    return {
        row.layer: (row.method, new_module(model, find_module(model, row.layer), row, seed))
        for row in manifest.allocations
        if row.method in ("adapter", "prefix")
    }


def _card(manifest: Manifest) -> str:
    rows = lora_rows(manifest)
    ranks = sorted({row.rank for row in rows})
    base = manifest.model.get("name_or_path", "the base model")
    parameters = sum(row.cost for row in rows)
    text = f"""---
library_name: peft
tags: [lora, layerlens]
---

# Zero-step LoRA adapter for {base}

LoRA on {_counted(len(rows), "module")}, rank{"s" if len(ranks) > 1 else ""} {", ".join(map(str, ranks))}, \
{parameters:,} trainable parameters, \
alpha/r = {manifest.lora["alpha_over_r"]:g}, chosen by LayerLens (manifest.json beside this directory). B is zero: \
the model computes exactly what it did before, until it is trained.

Load it with PEFT; LayerLens is not needed:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "peft", is_trainable=True)
```
"""
    others = [row.method for row in manifest.allocations if row.method in ("adapter", "prefix")]
    if others:
        kinds = {"adapter": ("adapter", "adapters"), "prefix": ("prefix", "prefixes")}
        counts = " and ".join(_counted(others.count(method), *kinds[method]) for method in dict.fromkeys(others))
        text += f"""
The manifest has {counts} as well, which PEFT cannot hold: see {MODULES_FILE} beside this
directory, and `layerlens.tuning.apply(base_model, manifest)` puts all of them into the model.
"""
    heads = list(manifest.model.get("head_modules") or [])
    if heads:
        task = TASK_TYPES.get(str(manifest.model.get("task")))
        with_head = f"config.modules_to_save = {heads}" if task is None else f'config.task_type = "{task}"'
        text += f"""
This trains the LoRA weights alone, as there are no head weights in this directory. To train the task head with them,
and have PEFT save it, start from the configuration (with B = 0 that is the same starting point):

```python
from peft import PeftConfig, get_peft_model

config = PeftConfig.from_pretrained("peft")
{with_head}
model = get_peft_model(base_model, config)
```
"""
    return text


def _counted(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
