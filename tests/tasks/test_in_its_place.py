"""Folders that are no model, or not a whole one: the message says what they have and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from language_support import MARKED, language_model, tokenizer
from safetensors.torch import load_file, save_file

from layerlens.exceptions import LayerLensError
from layerlens.registry import TASKS
from layerlens.sources import LoadRequest

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    pretrained = language_model(tokenizer(MARKED))
    pretrained.model.save_pretrained(folder)
    pretrained.tokenizer.save_pretrained(folder)
    return folder


def renamed(prefix: str) -> Any:
    def change(folder: Path) -> None:
        found = {prefix + name: tensor for name, tensor in load_file(folder / WEIGHTS).items()}
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def holes(folder: Path) -> None:
    found = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if "layers.1.mlp" not in name}
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})


def adapter_beside(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(folder)


def adapter_alone(folder: Path) -> None:
    adapter_beside(folder)
    (folder / "config.json").unlink()


def gguf(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-q4.gguf")


def gguf_alone(folder: Path) -> None:
    gguf(folder)
    (folder / "config.json").unlink()


def variant(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model.fp16.safetensors")


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed("_orig_mod."), r"lm_head\.weight and 20 more .*begin with _orig_mod\., as torch\.compile names them"),
        (renamed("module."), r"begin with module\., as DataParallel"),
        (holes, r"no weights for model\.layers\.1\.mlp\.down_proj\.weight and 2 more .*checkpoint that is whole$"),
        (adapter_beside, r"has a PEFT adapter \(adapter_config\.json\) beside its weights"),
        (adapter_alone, r"is a PEFT adapter of .*, not a model; give the base model, or merge"),
        (gguf, r"it has GGUF files only \(model-q4\.gguf\), which are for inference"),
        (gguf_alone, r"has GGUF files only \(model-q4\.gguf\), which are for inference"),
        (variant, r"it has model\.fp16\.safetensors: rename"),
        (no_tokenizer, r"the folder has no tokenizer: save it there"),
    ],
)
def test_what_a_folder_has_in_place_of_a_model_is_said(whole: Path, tmp_path: Path, change: Any, message: str):
    for file in whole.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change(tmp_path)
    request = LoadRequest(str(tmp_path), task="causal-lm")
    with pytest.raises(LayerLensError, match=message):
        request.source.load(request)


def test_a_classifier_under_the_names_of_a_wrapper(whole: Path, tmp_path: Path):
    for file in whole.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    renamed("_orig_mod.")(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    request = LoadRequest(str(tmp_path), task="sequence-classification", labels=("a", "b"))
    assert TASKS[request.task].new_head
    with pytest.raises(LayerLensError, match=r"lacks 18 parameters .*begin with _orig_mod\."):
        request.source.load(request)
