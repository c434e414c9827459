"""An entry for PEFT's method comparison on MetaMathQA: the choice as an experiment of that suite.

The suite (github.com/huggingface/peft, method_comparison/MetaMathQA) reads ``adapter_config.json`` of each folder below
``experiments/METHOD/``, puts new weights of its own seed into the model, and trains. ``training_params.json`` has what
differs from its default parameters. (Its README calls that file training_parameters.json; its code reads this name.)
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

from layerlens.exceptions import ManifestError
from layerlens.integrations.peft import adapter_config_json
from layerlens.models import Choice
from layerlens.registry import METHODS

if TYPE_CHECKING:
    import torch

NAME = "PEFT's method comparison"
SUITE_MODEL = "meta-llama/Llama-3.2-3B"
"""What the suite's default parameters name."""


def comparison_files(choice: Choice, model: torch.nn.Module, path: str) -> dict[str, str]:
    """The texts of an experiment by the names of their files.

    Args:
        choice: what is compared, all of it of one method of PEFT.
        model: the base model, for its module names; it is not changed.
        path: name or path of the base model.

    Raises:
        ManifestError: the suite cannot hold it.
    """
    if choice.lora.is_measured:
        raise ManifestError(
            f"{NAME} draws the first weights itself, and the manifest has lora.initialization "
            f"{choice.lora.initialization!r}; choose again with the initialization default"
        )
    if choice.tokens is not None:
        raise ManifestError(
            f"{NAME} adds no tokens to its tokenizer, and the manifest trains rows of some (model.tokens)"
        )
    config = METHODS[choice.peft_method].config(choice, model)
    config.task_type = "CAUSAL_LM"  # as the suite's other entries
    kind = config.peft_type.lower() if isinstance(config.peft_type, str) else config.peft_type.value.lower()
    rows = choice.of_method(choice.peft_method)
    base = "llama-3.2-3B" if path == SUITE_MODEL else path.rstrip("/").rpartition("/")[2]
    experiment = f"experiments/{kind}/{base}-layerlens-{len(rows)}-layers"
    files = {"adapter_config.json": adapter_config_json(config), "README.md": _readme(choice, experiment, path)}
    if changed := _parameters(model, path):
        files["training_params.json"] = json.dumps(changed, indent=2) + "\n"
    return files


def _parameters(model: torch.nn.Module, path: str) -> dict[str, str]:
    """What differs from the suite's default parameters: the model, and how its weights are stored."""
    found = {} if path == SUITE_MODEL else {"model_id": path}
    for flag, dtype in (("is_loaded_in_4bit", "int4"), ("is_loaded_in_8bit", "int8")):
        if getattr(model, flag, False):
            found["dtype"] = dtype
    return found


def _readme(choice: Choice, experiment: str, path: str) -> str:
    rows = choice.of_method(choice.peft_method)
    counted = Counter(row.rank for row in rows)
    table = "\n".join(f"| {rank} | {count} |" for rank, count in sorted(counted.items(), reverse=True))
    note = "" if path == SUITE_MODEL else (
        f"\nThe suite's other entries train {SUITE_MODEL}. This one trains {path}: compare it with "
        "entries that you run on the same model.\n"
    )  # fmt: skip
    return f"""# {METHODS[choice.peft_method].label} on the layers that LayerLens chose

An experiment for PEFT's method comparison on MetaMathQA: {len(rows)} layers of {path}, each with a rank of its own
(`rank_pattern` and `alpha_pattern` in `adapter_config.json`).

| rank | layers |
|---:|---:|
{table}
{note}
Run it in a checkout of PEFT, on a GPU:

```sh
cd peft/method_comparison/MetaMathQA
mkdir -p {experiment}
cp THIS_FOLDER/*.json {experiment}/
python run.py -v {experiment}
```

The suite trains it with its own defaults, as it does every other entry, and writes accuracy, memory and time.
"""
