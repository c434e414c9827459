"""The zero-step adapter directory: what any PEFT trainer starts from, without LayerLens and without changing a logit.

``peft/`` holds the LoRA rows in PEFT's own two files. It has no weights of the task head on purpose: the head of a
freshly loaded base model is random, so any head written here would change its logits, and PEFT refuses a file that
lacks the head when its configuration trains one. The README beside the files says how to train the head too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from layerlens.integrations.peft import adapter_config_json, lora_config, lora_rows, zero_step_tensors
from layerlens.models import Manifest
from layerlens.utils.files import directory_written_atomically

if TYPE_CHECKING:
    import torch

PEFT_DIRECTORY = "peft"


def export_adapter(manifest: Manifest, model: torch.nn.Module, directory: Path) -> dict[str, Path]:
    """Write the zero-step adapter of ``manifest`` below ``directory``; the same manifest gives the same bytes.

    Args:
        manifest: its LoRA rows go to ``directory``/peft.
        model: the base model, for its module names and shapes; it is not changed.
        directory: created if it is not there.

    Returns:
        The path of each thing written: "peft".

    Raises:
        ManifestError: the manifest does not fit the model.
        OutputError: the directory cannot be written.
    """
    from safetensors.torch import save

    written: dict[str, Path] = {}
    if lora_rows(manifest):
        config = lora_config(manifest, model, train_head=False)
        tensors = zero_step_tensors(manifest, model)
        target = Path(directory) / PEFT_DIRECTORY
        with directory_written_atomically(target) as folder:
            (folder / "adapter_config.json").write_text(adapter_config_json(config), encoding="utf-8")
            (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
            (folder / "README.md").write_text(_card(manifest), encoding="utf-8")
        written["peft"] = target
    return written


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

LoRA on {len(rows)} modules, ranks {", ".join(map(str, ranks))}, {parameters:,} trainable parameters, \
alpha/r = {manifest.lora["alpha_over_r"]:g}, chosen by LayerLens (manifest.json beside this directory). B is zero: \
the model computes exactly what it did before, until it is trained.

Load it with PEFT; LayerLens is not needed:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "peft", is_trainable=True)
```
"""
    if manifest.model.get("task") == "sequence-classification":
        text += """
This trains the LoRA weights alone, as there are no head weights in this directory. To train the task head with them,
and have PEFT save it, start from the configuration (with B = 0 that is the same starting point):

```python
from peft import PeftConfig, get_peft_model

config = PeftConfig.from_pretrained("peft")
config.task_type = "SEQ_CLS"
model = get_peft_model(base_model, config)
```
"""
    return text
