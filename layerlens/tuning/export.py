"""The zero-step adapter directory: what any PEFT trainer starts from, without LayerLens and without changing a logit.

``peft/`` holds the LoRA rows (or those of another method of PEFT) in PEFT's own files,
``layerlens_modules.safetensors`` the adapters and prefixes, which PEFT does not have. ``peft/`` has no weights of the
task head on purpose: the head of a freshly loaded base model is random, so any head written here would change its
logits, and PEFT refuses a file that lacks the head when its configuration trains one (a KeyError in 0.21). The README
beside the files says how to train the head too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from layerlens.integrations.peft import adapter_config_json, task_type
from layerlens.models import Choice, Manifest
from layerlens.registry import METHODS
from layerlens.tuning.base_model import check_weights, fitting_choice, load_base
from layerlens.tuning.initialization import read_factors
from layerlens.tuning.storage import MODULES_FILE, modules_bytes
from layerlens.utils.atomic import staged_directory

if TYPE_CHECKING:
    import torch

PEFT_DIRECTORY = "peft"


def export_adapter(
    given: Choice | Manifest,
    model: torch.nn.Module,
    directory: Path,
    factors: Mapping[str, torch.Tensor] | None = None,
    base: str | None = None,
) -> dict[str, Path]:
    """Write the zero-step adapter of a choice below ``directory``; the same choice gives the same bytes.

    What an earlier export left there is replaced, or removed where this choice has none of that kind.

    Args:
        given: its LoRA goes to ``directory``/peft, its adapters and prefixes to
            ``directory``/layerlens_modules.safetensors.
        model: the base model, for its module names and shapes; it is not changed.
        directory: created if it is not there.
        factors: LoRA's first A by layer, where ``lora.initialization`` is not "default" (see ``apply``).
        base: name or path of the base model; the one that a manifest names when None.

    Returns:
        The path of each thing written, under "peft" and "modules".

    Raises:
        ManifestError: the choice does not fit the model; nothing is then written.
        OutputError: the directory cannot be written.
    """
    choice, facts = fitting_choice(model, given, check_fingerprint=False)
    directory = Path(directory)
    peft_files = _peft_files(choice, model, factors, base or facts.place)
    modules = _modules(choice, model)
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


def apply_to_directory(
    manifest: Manifest, model: str | None, output: Path, measured: Path | None = None, *,
    trust_remote_code: bool = False,
) -> dict[str, Path]:  # fmt: skip
    """Load the manifest's base model and write its zero-step adapter below ``output``.

    Args:
        manifest: what to export.
        model: name or path of the base model; the one that the manifest names when None.
        output: directory, created if it is not there.
        measured: the run's peft directory, which has LoRA's first A where the initialisation comes from data.
        trust_remote_code: whether Python code beside the base model's weights may run.

    Returns:
        See ``export_adapter``.

    Raises:
        ManifestError: the manifest does not say which model, or was made for other weights or another shape.
        ModelNotFoundError: the model cannot be found or read.
        OutputError: the directory cannot be written.
    """
    base = load_base(manifest, model, trust_remote_code=trust_remote_code).model
    check_weights(base, manifest.model)
    factors = read_factors(measured or Path(PEFT_DIRECTORY), manifest)
    return export_adapter(manifest, base, output, factors)


def _peft_files(
    choice: Choice, model: torch.nn.Module, factors: Mapping[str, torch.Tensor] | None, base: str | None
) -> dict[str, bytes]:
    from safetensors.torch import save

    if not choice.peft_method:
        return {}
    method = METHODS[choice.peft_method]
    tensors = method.tensors(choice, model, factors)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return {
        "adapter_config.json": adapter_config_json(method.config(choice, model, train_head=False, base=base)).encode(),
        "adapter_model.safetensors": save(tensors, metadata={"format": "pt"}),
        "README.md": _card(choice, parameters, base or "the base model").encode(),
    }


def _modules(choice: Choice, model: torch.nn.Module) -> dict[str, tuple[str, torch.nn.Module]]:
    return {
        option.layer: (option.method, METHODS[option.method].new_module(model, option, choice.seed))
        for option in choice.other_options
    }


def _card(choice: Choice, parameters: int, base: str) -> str:
    rows, label = choice.peft_options, METHODS[choice.peft_method].label
    begin = {
        "default": "",
        "pca": " A holds the principal components of each layer's inputs.",
        "gradient_svd": " A holds the right singular vectors of each layer's mean gradient.",
    }[choice.lora.initialization if choice.lora_options else "default"]
    start = "B is zero: the" if choice.lora_options else "The"
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

`PeftModel.from_pretrained(base_model, "peft")` loads the {label} weights alone, as there are no head weights in this
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
tags: [{label.lower().replace(" ", "-")}, layerlens]
---

# Zero-step {label} adapter for {base}

{label} on {_counted(len(rows), "module")}, {_ranks(choice)}{parameters:,} trainable parameters, \
{_scale(choice)}chosen by LayerLens (manifest.json beside this directory). {start} model \
computes exactly what it did before, until it is trained.{begin}
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


def _counted(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
