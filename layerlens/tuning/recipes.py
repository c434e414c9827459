"""Code to copy that uses a choice in other programs: PEFT, Trainer, TRL, axolotl, vLLM.

``tests/tuning/test_recipes.py`` runs this code with the programs that are installed.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from layerlens.models import LORA, Manifest
from layerlens.models.recipe import Recipe
from layerlens.registry import ENGINES
from layerlens.sources import LoadRequest
from layerlens.tuning.card import resizing
from layerlens.tuning.task_head import HEAD_FILE

CAUSAL_LM, CLASSIFICATION = "causal-lm", "sequence-classification"
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
"""File suffix -> the reader of Hugging Face's datasets."""


def python_snippet(
    manifest: Manifest,
    path: Path,
    peft_directory: Path | None,
    model: str | None = None,
    *,
    named: Callable[[Path], str] = str,
) -> str:
    """Code that loads the base model and makes it ready to train.

    Plain PEFT where the manifest has LoRA only and its adapter directory is there; else LayerLens, which can inject
    adapters and prefixes too.

    Args:
        manifest: the plan.
        path: its file.
        peft_directory: its exported LoRA, if there is one.
        model: the base model, if it is not the one that the manifest names.
        named: how a path is written in the code.
    """
    imports, base = _base_model(manifest, model)
    standard: list[str] = []
    lines = resizing(manifest.model.token_training, "base").splitlines()
    if peft_directory is not None and plain_peft(manifest) and _has_heads(peft_directory, manifest.model.heads):
        imports = ["from peft import PeftModel", *imports]
        tuned = f"PeftModel.from_pretrained(base, {named(peft_directory)!r}, is_trainable=True)"
    else:
        standard = ["from pathlib import Path", ""]
        measured = manifest.lora.is_measured and LORA in _methods(manifest)
        fitted = manifest.model.heads and (path.parent / HEAD_FILE).is_file()
        names = ", ".join(["apply", *["read_factors"] * measured, *["read_head"] * bool(fitted)])
        own = ["from layerlens.manifest import read_manifest", f"from layerlens.tuning import {names}"]
        imports = [*imports, "", *own] if imports else own
        given, plan = "", f"read_manifest(Path({named(path)!r}))"
        if measured:  # LoRA's first A is in the exported adapter
            peft = named(peft_directory or path.parent / "peft")
            imports += ["", f"manifest = {plan}"]
            given, plan = f", factors=read_factors(Path({peft!r}), manifest)", "manifest"
        if fitted:
            given += f", head=read_head(Path({named(path.parent)!r}))"
        tuned = f"apply(base, {plan}{given})"
    comment = "# Now train `model` as you would any other: Trainer, TRL, or your own loop."
    return "\n".join([*standard, *imports, "", f"base = {base}", *lines, f"model = {tuned}", comment, ""])


def plain_peft(manifest: Manifest) -> bool:
    """Whether PEFT alone puts the whole choice into the model."""
    return _methods(manifest) == {LORA}


def recipes(manifest: Manifest, directory: Path, columns: Mapping[str, str], shown: str = "") -> tuple[Recipe, ...]:
    """The code for each program that can use the choice.

    Args:
        manifest: the choice.
        directory: where the manifest lies, with ``peft`` if that is written.
        columns: "source", "text" and "label" of the data, as far as they are known.
        shown: how the code calls the directory; "" where it is run there.
    """
    if not _methods(manifest):
        return ()
    peft = directory / "peft"

    def named(path: Path) -> str:
        return (Path(shown) / path.relative_to(directory)).as_posix()

    file = directory / "manifest.json"
    model = python_snippet(manifest, file, peft if peft.is_dir() else None, named=named)
    code = model.rpartition("# Now train")[0].rstrip() + "\n"
    name = "PEFT" if "PeftModel" in code else "PyTorch"
    found = [Recipe(name, code, "The model is an ordinary model, ready to train.")]
    if "base = ..." in code:  # a program had it in memory, so nothing else can load it
        return tuple(found)
    found.append(Recipe("Trainer", _trainer(manifest, code, columns), "The loop of transformers."))
    if manifest.model.task == CAUSAL_LM:
        found += _language_model(manifest, code, columns, named(directory))
    return tuple(found)


def why_fewer(manifest: Manifest) -> str:
    """Why there is no code for programs that train or serve language models; "" where there is."""
    if manifest.model.task == CAUSAL_LM or not _methods(manifest):
        return ""
    return f"TRL, axolotl and vLLM are for causal language models, and this choice is for {manifest.model.task}."


def _trainer(manifest: Manifest, code: str, columns: Mapping[str, str]) -> str:
    task, rows = manifest.model.task or "", _rows(columns)
    head = ["", "from datasets import load_dataset"] if "load_dataset" in rows else [""]
    learning_rate = _training(manifest).get("learning_rate") or 1e-3
    arguments = f'TrainingArguments("trained", learning_rate={learning_rate:g}, num_train_epochs=1, report_to="none")'
    if task == CLASSIFICATION and columns.get("text") and columns.get("label"):
        labels = list(manifest.model.labels or ())
        encode = [
            f"labels = {labels!r}",
            f"rows = {rows}",
            "rows = rows.map(",
            f"    lambda row: {{**tokenizer(row[{columns['text']!r}], truncation=True), "
            f'"labels": labels.index(str(row[{columns["label"]!r}]))}},',
            "    remove_columns=rows.column_names,",
            ")",
        ]
        collator = "DataCollatorWithPadding(tokenizer)"
    elif task == CAUSAL_LM and columns.get("text"):
        encode = [
            *_PADDED,
            f"rows = {rows}",
            f"rows = rows.map(lambda row: tokenizer(row[{columns['text']!r}], truncation=True), "
            "remove_columns=rows.column_names)",
        ]
        collator = "DataCollatorForLanguageModeling(tokenizer, mlm=False)"
    else:
        return code + "\n".join(
            [
                "",
                "from transformers import Trainer, TrainingArguments",
                "",
                "rows = ...  # your samples, encoded for the model, with their labels",
                f"arguments = {arguments}",
                "Trainer(model=model, args=arguments, train_dataset=rows).train()",
                'model.save_pretrained("trained")',
                "",
            ]
        )
    name = collator.partition("(")[0]
    tail = [
        f"arguments = {arguments}",
        f"Trainer(model=model, args=arguments, train_dataset=rows, data_collator={collator}).train()",
        'model.save_pretrained("trained")',
        "",
    ]
    imports = f"from transformers import AutoTokenizer, {name}, Trainer, TrainingArguments"
    return code + "\n".join([*head, imports, "", _TOKENIZER, *encode, *tail])


def _language_model(manifest: Manifest, code: str, columns: Mapping[str, str], place: str) -> list[Recipe]:
    learning_rate = _training(manifest).get("learning_rate") or 1e-3
    rows = _rows(columns)
    trl = [
        "",
        *(["from datasets import load_dataset"] if "load_dataset" in rows else []),
        "from transformers import AutoTokenizer",
        "from trl import SFTConfig, SFTTrainer",
        "",
        _TOKENIZER,
        *_PADDED,
        f"rows = {rows}",
        f'arguments = SFTConfig("trained", learning_rate={learning_rate:g}, num_train_epochs=1, report_to="none"'
        + (f", dataset_text_field={columns['text']!r})" if columns.get("text", "text") != "text" else ")"),
        "SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer).train()",
        'model.save_pretrained("trained")',
        "",
    ]
    found = [Recipe("TRL", code + "\n".join(trl))]
    part = "" if plain_peft(manifest) else " --lora-part"
    if not manifest.lora.is_measured and LORA in _methods(manifest):
        found.append(
            Recipe(
                "axolotl",
                f"layerlens export {shlex.quote(f'{place}/manifest.json')} --to axolotl{part} -o axolotl\n"
                "axolotl train axolotl/axolotl.yaml\n",
                "axolotl 0.18 or newer, for the ranks by layer; add your datasets to the YAML before you train.",
            )
        )
    if plain_peft(manifest):
        found.append(
            Recipe(
                "vLLM",
                f"layerlens train {shlex.quote(f'{place}/manifest.json')} -o tuned\n"
                f"layerlens export tuned --serve vllm -o served\n{_vllm(manifest)}\n",
                "vLLM serves the trained adapter; `export` writes the ranks in the form that vLLM reads.",
            )
        )
    return found


def _vllm(manifest: Manifest) -> str:
    """The command that starts vLLM with what ``export --serve vllm -o served`` writes."""
    engine = ENGINES["vllm"]
    largest = max(row.rank for row in manifest.allocations)
    base = manifest.model.name_or_path or ""
    rank = engine.rank_for(largest) or largest
    command: str = engine.command.format(base=shlex.quote(base), directory="served", rank=rank)
    return command


_TOKENIZER = "tokenizer = AutoTokenizer.from_pretrained(base.name_or_path)"
_PADDED = ("tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token",)


def _rows(columns: Mapping[str, str]) -> str:
    source = columns.get("source") or ""
    if source.startswith("hf:"):
        name, _, split = source.removeprefix("hf:").partition(":")
        return f"load_dataset({name!r}, split={split or 'train'!r})"
    kind = READERS.get(Path(source).suffix.lower())
    if kind is None:
        return "...  # your rows"
    return f'load_dataset({kind!r}, data_files={source!r}, split="train")'


def _training(manifest: Manifest) -> Mapping[str, Any]:
    return (manifest.provenance.config or {}).get("training") or {}


def _methods(manifest: Manifest) -> set[str]:
    return {row.method for row in manifest.allocations} - {"none"}


def _has_heads(peft_directory: Path, heads: tuple[str, ...]) -> bool:
    """Whether PEFT trains the task head too; directories of earlier versions left it out."""
    config = peft_directory / "adapter_config.json"
    if not heads or not config.is_file():
        return True
    return bool(json.loads(config.read_text(encoding="utf-8")).get("modules_to_save"))


def _base_model(manifest: Manifest, model: str | None) -> tuple[list[str], str]:
    """The imports and the expression that load the base model."""
    facts = manifest.model
    name = model or facts.name_or_path
    if not name:
        return [], "...  # the measured model"
    request = LoadRequest(
        name, facts.task or "", facts.labels or (), weights=facts.weights, quantization=facts.quantization
    )
    return request.source.snippet(request)
