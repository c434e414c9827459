"""A manifest for the trainer that the user already has: what it reads, or a refusal that names what it cannot hold.

All of them train LoRA alone. TRL and LLaMA-Factory start from the zero-step PEFT directory; axolotl makes the same LoRA
from its YAML; AdapterHub has one rank for all layers and the same matrices in every block that is not left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ManifestError
from layerlens.integrations.auto_classes import auto_class_of
from layerlens.integrations.peft import lora_config
from layerlens.integrations.transformers import blocks_of, role_of
from layerlens.models import LORA, Choice, Manifest, Option
from layerlens.sources import LoadRequest
from layerlens.tuning.base_model import base_reference, check_costs, check_names, check_weights, load_base
from layerlens.tuning.card import resizing
from layerlens.tuning.export import PEFT_DIRECTORY, export_adapter
from layerlens.tuning.initialization import read_factors
from layerlens.tuning.peft_comparison import NAME as COMPARISON
from layerlens.tuning.peft_comparison import comparison_files
from layerlens.tuning.task_head import read_head
from layerlens.utils.atomic import staged_directory

if TYPE_CHECKING:
    import torch

CAUSAL_LM = "causal-lm"
ADAPTERHUB_MATRICES = {"query": "q", "key": "k", "value": "v"}
ADAPTERHUB_FLAGS = {"ffn_up": "intermediate_lora", "ffn_down": "output_lora"}


@dataclass(frozen=True)
class Tool:
    """One trainer.

    Args:
        name: as people write it.
        tasks: what it trains; None for everything.
        starts_from_peft: it reads the zero-step PEFT directory.
        files: (choice, base model, its resolved name or path) -> text of further files by name.
    """

    name: str
    tasks: tuple[str, ...] | None
    starts_from_peft: bool
    files: Callable[[Choice, torch.nn.Module, str], dict[str, str]]


def export_for(
    tool: str, manifest: Manifest, model: str | None, output: Path, *, lora_part: bool = False, measured: Path,
    trust_remote_code: bool = False,
) -> dict[str, Path]:  # fmt: skip
    """Write below ``output`` what ``tool`` trains the manifest from.

    Args:
        tool: a key of ``TOOLS``.
        manifest: what to train.
        model: name or path of the base model; the one that the manifest names when None.
        output: directory, created if it is not there; other files in it stay.
        lora_part: leave adapters and prefixes out instead of refusing them.
        measured: the run's peft directory, which has LoRA's first A where the initialisation comes from data; the
            fitted task head is read from beside it.
        trust_remote_code: whether Python code beside the base model's weights may run.

    Returns:
        The path of each file or directory written, by its name.

    Raises:
        ManifestError: the tool cannot hold the manifest (the message names what), or it does not fit the model.
        ModelNotFoundError: the model cannot be found or read.
        OutputError: the directory cannot be written.
    """
    wanted = TOOLS[tool]
    chosen = _lora_part(manifest.choice, wanted.name, lora_part)
    task = chosen.task
    if task and wanted.tasks is not None and task not in wanted.tasks:
        raise ManifestError(
            f"{wanted.name} trains {', '.join(wanted.tasks)}, but the manifest is for {task}; use --to peft with your "
            "own loop or Trainer, or `layerlens train`"
        )
    name = base_reference(manifest, model)
    base = load_base(manifest, model, trust_remote_code=trust_remote_code).model
    check_names(base, chosen)
    check_weights(base, manifest.model)
    check_costs(base, manifest, chosen.chosen)
    request = LoadRequest(name)
    texts = wanted.files(chosen, base, request.source.resolve(request))
    with staged_directory(output, owned=(PEFT_DIRECTORY, *texts)) as staging:
        if wanted.starts_from_peft:
            head = read_head(measured.parent)
            export_adapter(
                chosen, base, staging, read_factors(measured, chosen), manifest.model.name_or_path, head=head
            )
        for file, text in texts.items():
            (staging / file).write_text(text, encoding="utf-8")
        names = sorted(path.name for path in staging.iterdir())
    return {file: output / file for file in names}


def _lora_part(choice: Choice, tool: str, lora_part: bool) -> Choice:
    others = choice.other_options
    if others and not lora_part:
        counted = []
        for method in dict.fromkeys(row.method for row in others):
            rows = [row for row in others if row.method == method]
            counted.append(f"{method} on {len(rows)} layer{'s' if len(rows) > 1 else ''} ({rows[0].layer} ...)")
        raise ManifestError(
            f"{tool} holds LoRA only, and the manifest has {' and '.join(counted)}; train it with `layerlens train`, "
            "export its LoRA with --lora-part, or choose again with optimization.methods: [lora]"
        )
    kind = choice.peft_method
    if kind not in ("", LORA) and tool not in ANY_PEFT:
        raise ManifestError(
            f"{tool} trains LoRA, and the manifest has {kind}; export with --to peft or --to trl, or use "
            "`layerlens train`"
        )
    if not kind:
        raise ManifestError(f"the manifest has no LoRA layer, so there is nothing for {tool} to train")
    return choice.only(option for option in choice.options if option not in others)


def _peft(choice: Choice, model: torch.nn.Module, path: str) -> dict[str, str]:
    return {}


def _trl(choice: Choice, model: torch.nn.Module, path: str) -> dict[str, str]:
    """A script, since the options of TRL's command line have no rank for each layer."""
    auto = auto_class_of(model)
    peft_names, tuned = "PeftModel", "    model = PeftModel.from_pretrained(base, str(PEFT), is_trainable=True)"
    if choice.tokens is not None and (whole := list(choice.tokens.whole_modules)):
        if choice.lora.is_measured:
            raise ManifestError(
                f"TRL: PEFT trains {', '.join(whole)} in full from a configuration alone, which cannot hold measured "
                f"factors (lora.initialization {choice.lora.initialization!r}); use `layerlens train`, or "
                "model.token_training: trainable_token_indices"
            )
        whole = [*(option.layer for option in choice.copied_options), *whole]
        lines = ["config = PeftConfig.from_pretrained(str(PEFT))", f"config.modules_to_save = {whole}"]
        lines += ["config.ensure_weight_tying = True"] if choice.tokens.tied else []
        peft_names = "PeftConfig, get_peft_model"
        tuned = "\n".join(f"    {line}" for line in (*lines, "model = get_peft_model(base, config)"))
    rows = f"    {line}\n" if (line := resizing(choice.tokens, "base").rstrip()) else ""
    script = f'''"""Trains the LoRA that LayerLens chose with TRL: python train_trl.py DATA [OUTPUT].

DATA is a .json, .jsonl, .csv, .parquet or .txt file, a folder of such files, or a data set of the hub.
Needs TRL 1.0 or newer.
"""

import sys
from pathlib import Path

from datasets import load_dataset
from peft import {peft_names}
from transformers import {auto}, AutoTokenizer
from trl import SFTConfig, SFTTrainer

BASE = {path!r}
PEFT = Path(__file__).parent / {PEFT_DIRECTORY!r}
KINDS = {{".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}}


def data_set(source):
    """The rows of a file, a folder, or a data set of the hub."""
    kind = KINDS.get(Path(source).suffix.lower())
    if kind is not None and Path(source).is_file():
        return load_dataset(kind, data_files=source, split="train")
    return load_dataset(source, split="train")


def trainer(train_dataset, output_dir="trl-output", **arguments):
    """A trainer on the chosen LoRA; `arguments` are SFTConfig's."""
    base = {auto}.from_pretrained(BASE)
{rows}{tuned}
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = SFTConfig(output_dir=output_dir, **arguments)
    return SFTTrainer(model=model, args=config, train_dataset=train_dataset, processing_class=tokenizer)


if __name__ == "__main__":
    trainer(data_set(sys.argv[1]), *sys.argv[2:3]).train()
'''
    return {"train_trl.py": script}


def _axolotl(choice: Choice, model: torch.nn.Module, path: str) -> dict[str, str]:
    fields = {"base_model": path, "adapter": "lora", "lora_dropout": 0.0, **axolotl_fields(choice, model)}
    return {"axolotl.yaml": _yaml(fields, AXOLOTL_TODO)}


def axolotl_fields(choice: Choice, model: torch.nn.Module) -> dict[str, Any]:
    """The LoRA of a choice in the keys of axolotl's configuration.

    Raises:
        ManifestError: axolotl cannot hold it.
    """
    config = lora_config(choice, model, train_head=False)
    ranks, patterns = dict(config.rank_pattern or {}), dict(config.alpha_pattern or {})
    alphas = {**patterns, "lora_alpha": config.lora_alpha}
    broken = {key: alpha for key, alpha in alphas.items() if alpha != int(alpha)}
    if broken:
        raise ManifestError(
            f"axolotl takes whole numbers for alpha, and alpha/r = {choice.lora.alpha_over_r:g} gives "
            f"{next(iter(broken.values())):g} ({next(iter(broken))}); choose again with a whole "
            "optimization.alpha_over_r"
        )
    targets = config.target_modules
    fields: dict[str, Any] = {
        "lora_r": config.r,
        "lora_alpha": int(config.lora_alpha),
        "lora_target_modules": sorted(targets) if isinstance(targets, set | list) else targets,
        "lora_rank_pattern": ranks,
        "lora_alpha_pattern": {key: int(alpha) for key, alpha in patterns.items()},
    }
    if config.trainable_token_indices:
        fields["peft_trainable_token_indices"] = config.trainable_token_indices
    whole = [*(config.modules_to_save or ()), *(choice.tokens.whole_modules if choice.tokens else ())]
    if whole:
        fields["lora_modules_to_save"] = whole
    if choice.tokens is not None and choice.tokens.whole_modules:
        fields |= {"peft_ensure_weight_tying": True} if choice.tokens.tied else {}
    if config.target_parameters:
        fields["lora_target_parameters"] = config.target_parameters
    if config.fan_in_fan_out:
        fields["lora_fan_in_fan_out"] = True
    if config.use_rslora:
        fields["peft_use_rslora"] = True
    if choice.lora.is_measured:
        raise ManifestError(
            f"axolotl's YAML cannot hold measured factors (lora.initialization {choice.lora.initialization!r}); export "
            "with --to peft and set lora_model_dir in axolotl"
        )
    empty = [key for key in ("lora_rank_pattern", "lora_alpha_pattern") if not fields[key]]
    return {key: value for key, value in fields.items() if key not in empty}


def _llama_factory(choice: Choice, model: torch.nn.Module, path: str) -> dict[str, str]:
    """Its own fields have one rank for all layers, so it continues from the directory, which has all of them."""
    fields = {
        "model_name_or_path": path,
        "adapter_name_or_path": PEFT_DIRECTORY,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "create_new_adapter": False,
        "output_dir": "llama-factory-output",
    }
    if choice.tokens is not None and choice.tokens.whole_modules:
        raise ManifestError(
            f"LLaMA-Factory continues from the directory, which does not hold {', '.join(choice.tokens.whole_modules)} "
            "whole; run with model.token_training: trainable_token_indices, or use `layerlens train`"
        )
    if choice.tokens is not None and choice.tokens.checkpoint_shapes:
        fields["resize_vocab"] = True
    return {"llama_factory.yaml": _yaml(fields, LLAMA_FACTORY_TODO)}


def _adapterhub(choice: Choice, model: torch.nn.Module, path: str) -> dict[str, str]:
    rows = choice.lora_options
    if choice.copied_options:
        raise ManifestError(f"AdapterHub trains no {choice.copied_options[0].method} beside LoRA; use --to peft")
    if choice.tokens is not None:
        raise ManifestError("AdapterHub trains no rows of embeddings (model.tokens); use --to peft")
    ranks = sorted({row.rank for row in rows})
    if len(ranks) > 1:
        raise ManifestError(
            f"AdapterHub has one LoRA rank for all layers, and the manifest has {', '.join(map(str, ranks))}; choose "
            "again with one entry in optimization.lora_ranks"
        )
    if choice.lora.use_rslora:
        raise ManifestError("AdapterHub has no rsLoRA (lora.use_rslora)")
    if choice.lora.is_measured:
        raise ManifestError(f"AdapterHub has no lora.initialization {choice.lora.initialization!r}")
    blocks = blocks_of(model)
    by_block = _adapterhub_roles(rows, blocks)
    kinds = {frozenset(roles) for roles in by_block.values()}
    if len(kinds) > 1:
        shown = "; ".join(f"block {block}: {', '.join(sorted(roles))}" for block, roles in sorted(by_block.items()))
        raise ManifestError(
            "AdapterHub adapts the same matrices in every block that is not left out, and the manifest does not "
            f"({shown})"
        )
    roles, rank = next(iter(kinds)), ranks[0]
    alpha = float(choice.lora.alpha_over_r or 0.0) * rank
    fields = {
        "architecture": "lora",
        "r": rank,
        "alpha": int(alpha) if alpha.is_integer() else alpha,
        "dropout": 0.0,
        "attn_matrices": [letter for role, letter in ADAPTERHUB_MATRICES.items() if role in roles],
        "selfattn_lora": any(role in roles for role in ADAPTERHUB_MATRICES),
        **{flag: role in roles for role, flag in ADAPTERHUB_FLAGS.items()},
        "leave_out": [block for block in range(len(blocks)) if block not in by_block],
    }
    return {"adapterhub_config.json": json.dumps(fields, indent=2) + "\n"}


def _adapterhub_roles(rows: tuple[Option, ...], blocks: tuple[str, ...]) -> dict[int, set[str]]:
    by_block: dict[int, set[str]] = {}
    known = {**ADAPTERHUB_MATRICES, **ADAPTERHUB_FLAGS}
    for row in rows:
        block = next((index for index, name in enumerate(blocks) if row.layer.startswith(name + ".")), None)
        if block is None or role_of(row.layer) not in known:
            raise ManifestError(
                f"{row.layer}: AdapterHub puts LoRA on a block's {', '.join(known)} only; choose again with "
                "optimization.constraints.rules"
            )
        by_block.setdefault(block, set()).add(role_of(row.layer))
    return by_block


def _yaml(fields: dict[str, Any], remaining: str) -> str:
    import yaml

    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=2**20)
    return f"# The LoRA that LayerLens chose. {remaining}\n{text}"


AXOLOTL_TODO = (
    "Needs axolotl 0.18 or newer, for the ranks by layer. Add your datasets, batch size and learning rate, then: "
    "axolotl train axolotl.yaml"
)
LLAMA_FACTORY_TODO = (
    "Add dataset, template and learning rate, then, from this directory: llamafactory-cli train llama_factory.yaml"
)
ANY_PEFT = ("PEFT", "TRL", COMPARISON)
"""What can begin from a directory of any method of PEFT."""
TOOLS = {
    "peft": Tool("PEFT", None, True, _peft),
    "trl": Tool("TRL", (CAUSAL_LM,), True, _trl),
    "axolotl": Tool("axolotl", (CAUSAL_LM,), False, _axolotl),
    "llama-factory": Tool("LLaMA-Factory", (CAUSAL_LM,), True, _llama_factory),
    "adapterhub": Tool("AdapterHub", None, False, _adapterhub),
    "peft-comparison": Tool(COMPARISON, (CAUSAL_LM,), False, comparison_files),
}
