"""README.md of an adapter directory: what the adapter is, how it is loaded, and what it takes to serve it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerlens.integrations.peft import task_type
from layerlens.models import Choice
from layerlens.registry import METHODS
from layerlens.tuning.storage import MODULES_FILE

OWN_CARD = "tags: [lora, layerlens]"
OF_PEFT = "### Framework versions\n\n- PEFT"
"""What stands in a card that was written here, and in PEFT's empty one."""


def is_own_card(path: Path) -> bool:
    """Whether a README may be replaced: it is not there, or nobody but this program and PEFT wrote it."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else OWN_CARD
    return OWN_CARD in text or OF_PEFT in text


def zero_step_card(choice: Choice, parameters: int, base: str) -> str:
    """Of ``peft/`` as a run writes it: what it is, and how PEFT trains it.

    Args:
        choice: has LoRA.
        parameters: numbers in the adapter's file.
        base: name or path of the base model.
    """
    rows, alpha_over_r = choice.lora_options, choice.lora.alpha_over_r or 0.0
    ranks = sorted({row.rank for row in rows})
    scale = f"alpha/r = {alpha_over_r:g}"
    if choice.lora.use_rslora:
        scale = f"scaled by alpha/√r (rsLoRA) with alpha = {alpha_over_r * ranks[-1]:g}"
    begin = {
        "default": "",
        "pca": " A holds the principal components of each layer's inputs.",
        "gradient_svd": " A holds the right singular vectors of each layer's mean gradient.",
    }[choice.lora.initialization]
    heads = list(choice.head_modules)
    if heads:
        task = task_type(choice.task)
        with_head = f"config.modules_to_save = {heads}" if task is None else f'config.task_type = "{task}"'
        loading = f"""
Train it with PEFT; LayerLens is not needed. The task head ({", ".join(heads)}) is trained too, and PEFT saves it with
the adapter:

```python
from peft import PeftConfig, get_peft_model

config = PeftConfig.from_pretrained("peft")
{with_head}
model = get_peft_model(base_model, config)
```

`PeftModel.from_pretrained(base_model, "peft")` loads the LoRA weights alone, as there are no head weights in this
directory: a head that is new in `base_model` would stay as it is, and would not be saved.
"""
        if begin:
            loading += """But only loaded in this second way does A begin as said above. With LayerLens,
`layerlens.load(DIRECTORY).apply(base_model)` gives both: that beginning, and the head.
"""
    else:
        loading = """
Load it with PEFT; LayerLens is not needed:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "peft", is_trainable=True)
```
"""
    text = f"""---
library_name: peft
{OWN_CARD}
---

# Zero-step LoRA adapter for {base}

LoRA on {_counted(len(rows), "module")}, rank{"s" if len(ranks) > 1 else ""} {", ".join(map(str, ranks))}, \
{parameters:,} trainable parameters, \
{scale}, chosen by LayerLens (manifest.json beside this directory). B is zero: \
the model computes exactly what it did before, until it is trained.{begin}
{loading}"""
    others = [option.method for option in choice.other_options]
    if others:
        measured = "" if not begin else ' (with `factors=layerlens.tuning.read_factors(Path("peft"), manifest)`)'
        kinds = [METHODS[name] for name in dict.fromkeys(others)]
        counts = " and ".join(_counted(others.count(kind.name), kind.label, kind.plural) for kind in kinds)
        text += f"""
The manifest has {counts} as well, which PEFT cannot hold: see {MODULES_FILE} beside this
directory, and `layerlens.tuning.apply(base_model, manifest)` puts all of them into the model{measured}.
"""
    return text


def tuned_card(
    choice: Choice, base: str, *, data: str, before: Mapping[str, float], after: Mapping[str, float],
    training: Mapping[str, Any],
) -> str:  # fmt: skip
    """Of a directory that ``layerlens train`` wrote: what was trained on what, with what result, and what to do next.

    Args:
        choice: what was trained.
        base: name or path of the base model.
        data: the source of the samples, and how many there were.
        before, after: metrics of the test split.
        training: settings of the training by name, and what they were.
    """
    heads = ", ".join(choice.head_modules)
    rows = [f"| task | {choice.task} |", f"| data | {data} |", f"| trained | {_trained(choice)} |"]
    rows += [f"| {name} | {value} |" for name, value in training.items()]
    text = f"""---
library_name: peft
base_model: {base}
{OWN_CARD}
---

# Adapter for {base}

| | |
|---|---|
{chr(10).join(rows)}
"""
    if after:
        text += "\n| metric of the test split | before | after |\n|---|---|---|\n"
        text += "".join(f"| {name} | {before.get(name, float('nan')):.4g} | {after[name]:.4g} |\n" for name in after)
    if choice.other_options:
        return (
            text
            + f"""
Load it with LayerLens, since PEFT does not have what is in {MODULES_FILE}:

```python
from pathlib import Path

import layerlens.tuning

model = layerlens.tuning.load(base_model, Path("this directory"))
```
"""
        )
    if not choice.lora_options:
        return text
    head = f" The task head ({heads}) is in the adapter, and replaces that of the base model." if heads else ""
    return (
        text
        + f"""
Load it with PEFT; LayerLens is not needed.{head}

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this directory")
merged = model.merge_and_unload()  # an ordinary model, as every serving engine takes it
```
{_serving(choice)}"""
    )


def _trained(choice: Choice) -> str:
    """``LoRA on 12 modules, ranks 1 to 8, alpha/r = 2; the head classifier``."""
    said = []
    if choice.lora_options:
        ranks = sorted({row.rank for row in choice.lora_options})
        span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        rule = "alpha/√r (rsLoRA)" if choice.lora.use_rslora else f"alpha/r = {choice.lora.alpha_over_r or 0.0:g}"
        said.append(f"LoRA on {_counted(len(choice.lora_options), 'module')}, {span}, {rule}")
    said += _others(choice)
    if choice.head_modules:
        said.append(f"the head {', '.join(choice.head_modules)}")
    return "; ".join(said) or "nothing"


def _others(choice: Choice) -> list[str]:
    others = [option.method for option in choice.other_options]
    kinds = [METHODS[name] for name in dict.fromkeys(others)]
    return [_counted(others.count(kind.name), kind.label, kind.plural) for kind in kinds]


def _serving(choice: Choice) -> str:
    """What an engine has to be told, or cannot do, to serve the adapter unmerged."""
    largest = max(row.rank for row in choice.lora_options)
    if choice.head_modules:
        return "\nServing engines take no head from an adapter: merge it, as above, and serve the merged model.\n"
    text = f"\nTo serve it unmerged, an engine has to hold rank {largest} (vLLM: `--max-lora-rank` of at least that)"
    mixed = len({row.rank for row in choice.lora_options}) > 1
    if mixed and choice.lora.use_rslora:
        text += (
            "; vLLM before 0.33 and others scale all layers by the largest rank, which is wrong for rsLoRA with "
            "several ranks: merge it there"
        )
    return text + ".\n"


def _counted(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
