"""LoRA rows of a manifest in the words of Hugging Face PEFT: a LoraConfig, and the tensors of a zero-step adapter.

How PEFT matches names decides what is written here:

- a ``target_modules`` list takes a module whose path equals an entry or ends in "." + entry; a string is a regular
  expression for the whole path;
- ``rank_pattern`` and ``alpha_pattern`` keys are tried one after the other as ``(.*\\.)?(KEY)$``, the first match wins,
  and saving sorts the keys. A key that begins with ``^`` cannot be reached through the prefix, so each of ours is
  anchored on both sides, escaped, and fits exactly one module: the order does not matter.

``r`` and ``lora_alpha`` hold the largest rank and patterns only lower it; alpha/r is the same everywhere. A tool that
ignores ``alpha_pattern`` (vLLM does) then still scales every layer right, and one that reserves memory for ``r`` rows
reserves enough.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ManifestError
from layerlens.integrations.torch_modules import find_module
from layerlens.integrations.transformers import dense_shape, is_dense
from layerlens.models import Manifest, ManifestRow

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

TASK_TYPES = {
    "sequence-classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
}
"""Task -> PEFT's, where PEFT has one and there is a head to train; it then finds the head by itself. Not QUESTION_ANS:
its model (0.21) takes ``token_type_ids`` and does not pass them on, which changes the logits of BERT."""
INITS = ("default",)


def lora_rows(manifest: Manifest) -> tuple[ManifestRow, ...]:
    """The rows that choose LoRA."""
    return tuple(row for row in manifest.allocations if row.method == "lora")


def lora_config(manifest: Manifest, model: torch.nn.Module, *, train_head: bool = True) -> LoraConfig:
    """The manifest's LoRA as a PEFT configuration; layers with rank 0 are not in it.

    Args:
        manifest: has at least one LoRA row.
        model: the base model, for its module names and shapes; it is not changed.
        train_head: let PEFT train and save the task head too. PEFT then refuses to load an adapter file that has no
            head weights (a KeyError), which is why the zero-step export is made without.

    Raises:
        ManifestError: no LoRA row, an unknown module, a module that cannot take LoRA or has another shape, or
            ``manifest.lora`` is incomplete.
    """
    from peft import LoraConfig

    rows = lora_rows(manifest)
    if not rows:
        raise ManifestError("the manifest has no LoRA row, so there is nothing for PEFT to configure")
    modules = {row.layer: _lora_module(model, row) for row in rows}
    scale, largest = _alpha_over_r(manifest), max(row.rank for row in rows)
    lowered = {f"^{re.escape(row.layer)}": row.rank for row in rows if row.rank < largest}
    task = TASK_TYPES.get(str(manifest.model.get("task")))
    heads = list(manifest.model.get("head_modules") or ())
    return LoraConfig(
        base_model_name_or_path=manifest.model.get("name_or_path"),
        task_type=task if train_head else None,
        modules_to_save=heads or None if train_head else None,
        target_modules=_target_modules(model, [row.layer for row in rows]),
        r=largest,
        lora_alpha=_alpha(scale, largest),
        rank_pattern=dict(sorted(lowered.items())),
        alpha_pattern={key: _alpha(scale, rank) for key, rank in sorted(lowered.items())},
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=any(hasattr(module, "nf") for module in modules.values()),
    )


def zero_step_tensors(manifest: Manifest, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of adapter_model.safetensors before the first step: B = 0, so no logit changes.

    Returns:
        float32 ``base_model.model.<layer>.lora_A.weight`` [r, n_in] (of a convolution [r, channels, height, width]),
        uniform in ±1/√n_in as PEFT initialises it (Kaiming with a = √5), and ``....lora_B.weight`` [n_out, r], zero.
        A depends only on the seed in ``manifest.provenance`` and the layer's name.

    Raises:
        ManifestError: see ``lora_config``.
    """
    import torch

    seed = manifest_seed(manifest)
    tensors = {}
    for row in lora_rows(manifest):
        module = _lora_module(model, row)
        n_in, n_out, groups = lora_shape(module)
        a_shape: tuple[int, ...] = (row.rank, n_in)
        b_shape: tuple[int, ...] = (n_out, row.rank // groups)
        if isinstance(module, torch.nn.Conv2d):
            a_shape, b_shape = (row.rank, module.in_channels, *module.kernel_size), (*b_shape, 1, 1)
        bound = 1.0 / math.sqrt(n_in)
        generator = torch.Generator().manual_seed(name_seed(seed, row.layer))
        key = f"base_model.model.{row.layer}"
        tensors[f"{key}.lora_A.weight"] = torch.empty(a_shape).uniform_(-bound, bound, generator=generator)
        tensors[f"{key}.lora_B.weight"] = torch.zeros(b_shape)
    return tensors


def adapter_config_json(config: LoraConfig) -> str:
    """The text of adapter_config.json: what PEFT's save_pretrained writes, with its sets in a fixed order."""
    fields = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def injected_ranks(model: Any) -> dict[str, int]:
    """Rank of every LoRA layer that PEFT put into ``model``, by the layer's name in the base model."""
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        name: layer.r[layer.active_adapters[0]]
        for name, layer in base.named_modules()
        if isinstance(layer, LoraLayer) and layer.active_adapters
    }


def manifest_seed(manifest: Manifest) -> int:
    """Seed of everything new: ``manifest.provenance["seed"]``, 0 if there is none.

    Raises:
        ManifestError: it is not a whole number.
    """
    provenance: Mapping[str, Any] = manifest.provenance
    seed = provenance.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ManifestError(f"provenance.seed: must be a whole number, got {seed!r}")
    return seed


def name_seed(seed: int, name: str) -> int:
    """A seed for one layer: it does not depend on which other layers were chosen, nor on their order."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def _lora_module(model: torch.nn.Module, row: ManifestRow) -> torch.nn.Module:
    import torch

    from layerlens.integrations.layers import why_no_lora

    module = find_module(model, row.layer)
    if not is_dense(module) and not isinstance(module, torch.nn.Conv2d):
        raise ManifestError(
            f"{row.layer}: LoRA goes on a Linear, Conv1D or Conv2d, this is a {type(module).__name__}; "
            "profile the model with module granularity"
        )
    if isinstance(module, torch.nn.Conv2d) and (reason := why_no_lora(row.layer, module)):
        raise ManifestError(f"{row.layer}: {reason}")
    n_in, n_out, groups = lora_shape(module)
    if row.rank % groups:
        raise ManifestError(
            f"{row.layer}: LoRA rank {row.rank} is no multiple of the {groups} groups of this convolution, which PEFT "
            "demands"
        )
    trained = row.rank * (n_in + n_out // groups)
    if row.cost != trained:
        raise ManifestError(
            f"{row.layer}: LoRA rank {row.rank} on this {n_in} → {n_out} module trains {trained} "
            f"parameters, the manifest says {row.cost}; it was made for a model of another shape"
        )
    return module


def lora_shape(module: Any) -> tuple[int, int, int]:
    """(n_in, n_out, groups): A is [r, n_in], B is [n_out, r / groups]; of a convolution n_in is a patch."""
    import torch

    if isinstance(module, torch.nn.Conv2d):
        patch = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
        return patch, module.out_channels, module.groups
    return (*dense_shape(module), 1)


def _target_modules(model: torch.nn.Module, names: list[str]) -> list[str] | str:
    """Full names; one regular expression instead where a name is also the ending of a longer one."""
    endings = tuple("." + name for name in names)
    if any(known.endswith(endings) for known, _ in model.named_modules() if known not in names):
        return "|".join(re.escape(name) for name in sorted(names))
    return sorted(names)


def _alpha_over_r(manifest: Manifest) -> float:
    init = manifest.lora.get("init", "default")
    if init not in INITS:
        raise ManifestError(f"lora.init: {init!r} is not known; known: {', '.join(INITS)}")
    scale = manifest.lora.get("alpha_over_r")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise ManifestError(f"lora.alpha_over_r: must be a number above 0, got {scale!r}")
    return float(scale)


def _alpha(scale: float, rank: int) -> Any:  # PEFT declares int and takes any number
    alpha = scale * rank
    return int(alpha) if alpha.is_integer() else alpha  # most tools read lora_alpha as an integer
