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

With ``lora.use_rslora`` a layer is scaled by alpha/√r instead (Kalajdzievski 2023, arXiv:2312.03732). There alpha is
the constant, alpha_over_r times the largest rank, so ``r`` and ``lora_alpha`` are the same as without, and there is no
``alpha_pattern``.
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
INITIALIZATIONS = ("default", "pca", "gradient_svd")
"""How A begins; B is zero with each of them. ``tuning.initialization`` says what they are."""
BASE_PREFIX = "base_model.model."
"""What PEFT puts before the base model's names in its files."""


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
    scale, largest, rslora = _alpha_over_r(manifest), max(row.rank for row in rows), _use_rslora(manifest)
    lowered = {f"^{re.escape(row.layer)}": row.rank for row in rows if row.rank < largest}
    task = TASK_TYPES.get(str(manifest.model.get("task")))
    heads = list(manifest.model.get("head_modules") or ())
    return LoraConfig(
        base_model_name_or_path=manifest.model.get("name_or_path"),
        task_type=task if train_head else None,
        modules_to_save=heads or None if train_head else None,
        target_modules=target_modules(model, [row.layer for row in rows]),
        r=largest,
        lora_alpha=_alpha(scale, largest),
        rank_pattern=dict(sorted(lowered.items())),
        alpha_pattern={} if rslora else {key: _alpha(scale, rank) for key, rank in sorted(lowered.items())},
        use_rslora=rslora,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=any(hasattr(module, "nf") for module in modules.values()),  # transformers' Conv1D
    )


def zero_step_tensors(
    manifest: Manifest, model: torch.nn.Module, factors: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of adapter_model.safetensors before the first step: B = 0, so no logit changes.

    Args:
        manifest: its LoRA rows are initialised.
        model: the base model, for its shapes.
        factors: A [r, n_in] of every LoRA layer by name, where ``lora.initialization`` is not "default".

    Returns:
        float32 ``base_model.model.<layer>.lora_A.weight`` [r, n_in] and ``....lora_B.weight`` [n_out, r], zero; of a
        convolution [r, channels, height, width] and [n_out, r, 1, 1]. By default A is uniform in ±1/√n_in as PEFT
        initialises it (Kaiming with a = √5), and depends only on the seed in ``manifest.provenance`` and the layer's
        name.

    Raises:
        ManifestError: see ``lora_config``; or factors are needed and not given, or have another shape.
    """
    initialization = lora_initialization(manifest)
    if initialization != "default" and factors is None:
        raise ManifestError(
            f"lora.initialization: {initialization!r} begins from what was measured on data; give the factors "
            "(layerlens.tuning.read_factors of the run's peft directory, or initial_factors of your own batches)"
        )
    tensors = {}
    for row in lora_rows(manifest):
        module = _lora_module(model, row)
        n_in, n_out, groups = lora_shape(module)
        if initialization == "default":
            a = default_factor(manifest, row, n_in)
        else:
            a = _given_factor(row, n_in, factors or {})
        kernel = tuple(getattr(module, "kernel_size", ()))
        key = BASE_PREFIX + row.layer
        tensors[f"{key}.lora_A.weight"] = a.reshape(row.rank, -1, *kernel) if kernel else a
        tensors[f"{key}.lora_B.weight"] = a.new_zeros(n_out, row.rank // groups, *(1 for _ in kernel))
    return tensors


def default_factor(manifest: Manifest, row: ManifestRow, n_in: int) -> torch.Tensor:
    """A of one layer as PEFT draws it, float32 [r, n_in]."""
    import torch

    bound = 1.0 / math.sqrt(n_in)
    generator = torch.Generator().manual_seed(name_seed(manifest_seed(manifest), row.layer))
    return torch.empty(row.rank, n_in).uniform_(-bound, bound, generator=generator)


def _given_factor(row: ManifestRow, n_in: int, factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if row.layer not in factors:
        raise ManifestError(f"{row.layer}: no initial factor given; there are factors of {len(factors)} layers")
    factor = factors[row.layer].detach().float().cpu().contiguous()
    if tuple(factor.shape) != (row.rank, n_in):
        raise ManifestError(f"{row.layer}: the initial factor is {tuple(factor.shape)}, needed is {(row.rank, n_in)}")
    return factor


def lora_initialization(manifest: Manifest) -> str:
    """How A begins: one of ``INITIALIZATIONS``.

    Raises:
        ManifestError: ``lora.initialization`` is not known.
    """
    name = manifest.lora.get("initialization", "default")
    if name not in INITIALIZATIONS:
        raise ManifestError(f"lora.initialization: {name!r} is not known; known: {', '.join(INITIALIZATIONS)}")
    return str(name)


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
    module = find_module(model, row.layer)
    if reason := why_not_adaptable(row.layer, module):
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


def why_not_adaptable(name: str, module: Any) -> str:
    """Why PEFT's LoRA cannot go on this module; "" where it can. Any kind of Linear can take it, measurable or not."""
    import torch

    from layerlens.integrations.layers import why_no_lora

    if isinstance(module, torch.nn.Conv2d):
        return why_no_lora(name, module)
    if is_dense(module):
        return ""
    return (
        f"LoRA goes on a Linear, Conv1D or Conv2d, this is a {type(module).__name__}; "
        "profile the model with module granularity"
    )


def lora_shape(module: Any) -> tuple[int, int, int]:
    """(n_in, n_out, groups): A is [r, n_in], B is [n_out, r / groups]; of a convolution n_in is a patch."""
    import torch

    if isinstance(module, torch.nn.Conv2d):
        patch = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
        return patch, module.out_channels, module.groups
    return (*dense_shape(module), 1)


def target_modules(model: torch.nn.Module, names: list[str]) -> list[str] | str:
    """Full names; one regular expression instead where a name is also the ending of a longer one."""
    endings = tuple("." + name for name in names)
    if any(known.endswith(endings) for known, _ in model.named_modules() if known not in names):
        return "|".join(re.escape(name) for name in sorted(names))
    return sorted(names)


def _alpha_over_r(manifest: Manifest) -> float:
    lora_initialization(manifest)
    scale = manifest.lora.get("alpha_over_r")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise ManifestError(f"lora.alpha_over_r: must be a number above 0, got {scale!r}")
    return float(scale)


def _use_rslora(manifest: Manifest) -> bool:
    given = manifest.lora.get("use_rslora", False)
    if not isinstance(given, bool):
        raise ManifestError(f"lora.use_rslora: must be true or false, got {given!r}")
    return given


def _alpha(scale: float, rank: int) -> Any:  # PEFT declares int and takes any number
    alpha = scale * rank
    return int(alpha) if alpha.is_integer() else alpha  # most tools read lora_alpha as an integer
