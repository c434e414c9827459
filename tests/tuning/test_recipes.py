"""The code that a report offers to copy: what is written there runs, and trains what was chosen."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from layerlens.cli.main import app
from layerlens.config import RunConfig
from layerlens.pipeline import run_config
from layerlens.tuning.recipes import plain_peft, recipes, why_fewer

FAST = ("num_train_epochs=1", "max_steps=2, use_cpu=True, per_device_train_batch_size=2, num_train_epochs=1")


def offered(folder: Path) -> dict[str, str]:
    """The code in a run's report, by program."""
    page = (folder / "out/report.html").read_text(encoding="utf-8")
    found = re.findall(r'<pre data-copy="([^"]+)"[^>]*><code>(.*?)</code>', page, re.DOTALL)
    return {name: unescape(code) for name, code in found}


def do(code: str) -> dict[str, Any]:
    space: dict[str, Any] = {"__name__": "copied"}
    exec(compile(code.replace(*FAST), "report.html", "exec"), space)
    return space


def ran(folder: Path, model: Path, rows: list[dict[str, Any]], task: str, **optimization: Any) -> dict[str, str]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = {
        "model": {"name_or_path": str(model), "task": task},
        "data": {"source": "rows.jsonl", "calibration_samples": 8, "max_length": 12, "batch_size": 4},
        "optimization": {
            "max_trainable_params": 600,
            "lora_ranks": [1, 2],
            "check_predictions": False,
            "latency_profile": {"batch_size": 2, "sequence_length": 12},
            **optimization,
        },
    }
    run_config(RunConfig.model_validate(config), base_dir=folder, use_cache=False)
    return offered(folder)


def trained(model: Any) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def test_the_code_for_a_classifier_runs(tiny_bert_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"{'good' if n % 2 else 'poor'} film {n}", "label": "pos" if n % 2 else "neg"} for n in range(12)]
    found = ran(tmp_path, tiny_bert_dir, rows, "sequence-classification")
    assert list(found) == ["PEFT", "Trainer"]
    monkeypatch.chdir(tmp_path)
    space = do(found["Trainer"])  # it begins with all of PEFT's
    assert found["Trainer"].startswith(found["PEFT"])
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    heads = sum(weight.numel() for name, weight in space["model"].named_parameters() if "modules_to_save" in name)
    assert trained(space["model"]) == sum(row["cost"] for row in manifest["allocations"]) + heads
    assert (tmp_path / "trained/adapter_model.safetensors").is_file()
    assert "TRL, axolotl and vLLM are for causal language models" in (tmp_path / "out/report.html").read_text()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, minilm_path: str) -> Path:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    tokenizer.eos_token = tokenizer.sep_token  # every language model's tokenizer has one
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_the_code_for_a_language_model_runs(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ran(tmp_path, llama, [{"text": f"a good film number {n}"} for n in range(12)], "causal-lm")
    assert list(found) == ["PEFT", "Trainer", "TRL", "axolotl", "vLLM"]
    monkeypatch.chdir(tmp_path)
    for name in ("Trainer", "TRL"):
        before = do(found["PEFT"])["model"]
        after = do(found[name])["model"]
        assert trained(after) == trained(before) > 0, name
    commands = {name: found[name].splitlines() for name in ("axolotl", "vLLM")}
    runner = CliRunner()
    export = commands["axolotl"][0].split()[1:]
    assert runner.invoke(app, export).exit_code == 0
    assert yaml.safe_load((tmp_path / "axolotl/axolotl.yaml").read_text())["adapter"] == "lora"
    assert commands["axolotl"][1] == "axolotl train axolotl/axolotl.yaml"
    train, serve, start = commands["vLLM"]
    assert runner.invoke(app, [*train.split()[1:], "--set", "training.max_steps=1"]).exit_code == 0
    assert runner.invoke(app, serve.split()[1:]).exit_code == 0
    assert start.replace("tuned=served", "tuned=DIRECTORY") in (tmp_path / "served/README.md").read_text()


def test_what_peft_cannot_hold_and_what_nothing_can_load(manifest_of: Callable[..., Any], tiny: Any, tmp_path: Path):
    spec = tiny("bert").spec
    layers = [layer.name for layer in spec.layers if "lora" in layer.methods]
    mixed = manifest_of(spec, {layers[0]: ("lora", 2), layers[1]: ("adapter", 2)})
    assert not plain_peft(mixed)
    assert [recipe.name for recipe in recipes(mixed, tmp_path, {})] == ["PyTorch", "Trainer"]
    assert "from layerlens.tuning import apply" in recipes(mixed, tmp_path, {})[0].code
    assert recipes(manifest_of(spec, {}), tmp_path, {}) == ()
    in_memory = manifest_of(spec, {layers[0]: ("lora", 2)}, name_or_path="object:Mine")
    assert len(recipes(in_memory, tmp_path, {})) == 1
    assert why_fewer(manifest_of(spec, {}, task="causal-lm")) == ""
