"""README.md of an adapter directory: what the adapter is, how it is loaded, and what it takes to serve it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerlens.models import Choice, Option
from layerlens.models.tokens import TokenTraining
from layerlens.registry import METHODS
from layerlens.tuning.storage import MODULES_FILE

OWN_CARD = ", layerlens]"
OF_PEFT = "### Framework versions\n\n- PEFT"
"""What stands in a card that was written here, and in PEFT's empty one."""


def is_own_card(path: Path) -> bool:
    """Whether a README may be replaced: it is not there, or nobody but this program and PEFT wrote it."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else OF_PEFT
    return any(line.startswith("tags: [") and line.endswith(OWN_CARD) for line in text.splitlines()) or OF_PEFT in text


def _tags(choice: Choice) -> str:
    kind = METHODS[choice.peft_method].label.lower().replace(" ", "-") if choice.peft_method else "peft"
    return f"tags: [{kind}{OWN_CARD}"


def zero_step_card(choice: Choice, parameters: int, base: str, *, fitted: bool = False) -> str:
    """Of ``peft/`` as a run writes it: what it is, and how PEFT trains it.

    Args:
        choice: PEFT puts some of it in.
        parameters: numbers in the adapter's file.
        base: name or path of the base model.
        fitted: whether the task head is the one that the layers were measured with; else it is as the base model was
            loaded.
    """
    label, more_rows = METHODS[choice.peft_method].label, resizing(choice.tokens)
    begin = {
        "default": "",
        "pca": " A holds the principal components of each layer's inputs.",
        "gradient_svd": " A holds the right singular vectors of each layer's mean gradient.",
    }[choice.lora.initialization if choice.lora_options else "default"]
    start = "B is zero: the" if choice.lora_options else "The"
    heads = ", ".join(choice.head_modules)
    before = "the base model does with the head in this directory" if heads else "it did before"
    loading = f"""
Load it with PEFT, and train it; LayerLens is not needed:

```python
from peft import PeftModel

{more_rows}model = PeftModel.from_pretrained(base_model, "peft", is_trainable=True)
```
"""
    if heads:
        came = "as it was while the layers were measured" if fitted else "as it is in the base model"
        loading += f"""
The fully trained part ({heads}) is in this directory too, {came}. It replaces that of `base_model`, and
`model.save_pretrained` writes it with the adapter. A model from `get_peft_model` starts with its own head.
"""
    text = f"""---
library_name: peft
{_tags(choice)}
---

# Zero-step {label} adapter for {base}

{label} on {_counted(len(_own(choice)), "module")}, {_ranks(choice)}{_copies(choice)}{_rows(choice)}{parameters:,} \
trainable parameters, {_scale(choice)}chosen by LayerLens (manifest.json beside this directory). {start} model \
computes exactly what {before}, until it is trained.{begin}
{loading}"""
    others = [option.method for option in choice.other_options]
    if others:
        kinds = [METHODS[name] for name in dict.fromkeys(others)]
        counts = " and ".join(_counted(others.count(kind.name), kind.label, kind.plural) for kind in kinds)
        text += f"""
The manifest also has {counts}, which PEFT cannot hold: see {MODULES_FILE} beside this
directory. `layerlens.tuning.load(base_model, DIRECTORY)` puts all of them into the model; DIRECTORY is the one above.
"""
    return text


def resizing(tokens: TokenTraining | None, model: str = "base_model") -> str:
    """The line that gives the base model rows for tokens that its checkpoint lacks; "" where it needs none."""
    if tokens is None or not tokens.checkpoint_shapes:
        return ""
    return f"{model}.resize_token_embeddings({tokens.rows})  # the checkpoint has fewer\n"


def _own(choice: Choice) -> list[Option]:
    """The options of the method that the directory is of."""
    return [option for option in choice.peft_options if option not in choice.copied_options]


def _copies(choice: Choice) -> str:
    """What is trained as copies beside it, whole: ``3 tuned norms (modules_to_save), ``."""
    names = [option.method for option in choice.copied_options]
    kinds = [METHODS[name] for name in dict.fromkeys(names)]
    counts = [_counted(names.count(kind.name), kind.plural.removesuffix("s"), kind.plural) for kind in kinds]
    return f"{' and '.join(counts)} (modules_to_save), " if counts else ""


def _rows(choice: Choice) -> str:
    return f"the rows of {_counted(len(choice.tokens.indices), 'token')}, " if choice.tokens else ""


def _ranks(choice: Choice) -> str:
    ranks = sorted({row.rank for row in choice.lora_options})
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}, " if ranks else ""


def _scale(choice: Choice) -> str:
    if not choice.lora_options:
        return ""
    alpha_over_r, largest = choice.lora.alpha_over_r or 0.0, max(row.rank for row in choice.lora_options)
    if choice.lora.use_rslora:
        return f"scaled by alpha/√r (rsLoRA) with alpha = {alpha_over_r * largest:g}, "
    return f"alpha/r = {alpha_over_r:g}, "


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
{_tags(choice)}
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
Load it with LayerLens, because PEFT cannot load {MODULES_FILE}:

```python
from pathlib import Path

import layerlens.tuning

{resizing(choice.tokens)}model = layerlens.tuning.load(base_model, Path("this directory"))
```
"""
        )
    if not choice.peft_method:
        return text
    head = f" The task head ({heads}) is in the adapter, and replaces that of the base model." if heads else ""
    return (
        text
        + f"""
Load it with PEFT; LayerLens is not needed.{head}

```python
from peft import PeftModel

{resizing(choice.tokens)}model = PeftModel.from_pretrained(base_model, "this directory")
merged = model.merge_and_unload()  # an ordinary model, for any serving engine
```
{_serving(choice)}"""
    )


def _trained(choice: Choice) -> str:
    """``LoRA on 12 modules, ranks 1 to 8, alpha/r = 2; the head classifier``."""
    said = []
    if choice.peft_options:
        on = f"{METHODS[choice.peft_method].label} on {_counted(len(_own(choice)), 'module')}"
        said.append(f"{on}, {_ranks(choice)}{_copies(choice)}{_scale(choice)}".strip().rstrip(","))
    said += _others(choice)
    if choice.head_modules:
        said.append(f"the head {', '.join(choice.head_modules)}")
    if choice.token_indices:
        said.append(_rows(choice).rstrip(", "))
    return "; ".join(said) or "nothing"


def _others(choice: Choice) -> list[str]:
    others = [option.method for option in choice.other_options]
    kinds = [METHODS[name] for name in dict.fromkeys(others)]
    return [_counted(others.count(kind.name), kind.label, kind.plural) for kind in kinds]


def _serving(choice: Choice) -> str:
    """What an engine must be told, or cannot do, to serve the adapter unmerged."""
    if choice.head_modules:
        return "\nServing engines do not load a head from an adapter. Merge it as above, and serve the merged model.\n"
    if choice.copied_options:
        return "\nServing engines do not load norms from an adapter. Merge it as above, and serve the merged model.\n"
    if choice.tokens:
        return "\nServing engines do not load rows of embeddings. Merge it as above, and serve the merged model.\n"
    if not choice.lora_options:
        return "\nFew serving engines load this kind of adapter. Merge it as above, and serve the merged model.\n"
    largest = max(row.rank for row in choice.lora_options)
    text = (
        f"\nTo serve it unmerged, the engine must support rank {largest} (vLLM: set `--max-lora-rank` to at least that)"
    )
    mixed = len({row.rank for row in choice.lora_options}) > 1
    if mixed and choice.lora.use_rslora:
        text += (
            "; vLLM before 0.33 and others scale all layers by the largest rank, which is wrong for rsLoRA with "
            "several ranks: merge it there"
        )
    return text + ".\n"


def _counted(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
