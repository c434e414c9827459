"""Costs predicted from shapes and a trace without data, held against the model that really runs.

Times are not judged here; benchmarks/cost_benchmark.py does that on a quiet machine.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from layerlens.cli.main import app
from layerlens.cost.device import DeviceProfile, Rates, load_profile, save_profile
from layerlens.cost.measure import peak_bytes
from layerlens.cost.trace import trace_step
from layerlens.exceptions import ManifestError, OutputError
from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.jobs.costs import Comparison, compare_costs
from layerlens.models import Choice, LoraSettings, Option
from layerlens.models.step import KINDS, MATMUL, MEMORY, TracedOperation

PROFILE = DeviceProfile("a test", 1, {kind: Rates(1.0, 10.0, 100.0) for kind in KINDS}, 1.0)
CHOICES = {
    "nothing below the last block": {"ffn_down": ("lora", 4)},
    "lora": {"query": ("lora", 4), "ffn_up": ("lora", 2)},
    "mixed": {"ffn_up": ("lora", 2), "ffn_down": ("adapter", 3), "attention": ("prefix", 4)},
}


def model_and_choice(architecture: str, choice: dict[str, Any], first_block: int) -> tuple[Any, Choice]:
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    if architecture == "bert":
        model: Any = BertForSequenceClassification(BertConfig(vocab_size=200, num_labels=3, **wide))
        task, heads = "sequence-classification", ["classifier"]
    else:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=200, num_key_value_heads=2, **wide))
        task, heads = "causal-lm", []
    model.eval().requires_grad_(False)
    pretrained = PretrainedModel(model, None, "", ())
    rows = []
    for layer in model_spec(pretrained, architecture).layers:
        method, rank = choice.get(layer.role, ("none", 0)) if (layer.block or 0) >= first_block else ("none", 0)
        rows.append(Option(layer.name, method, rank))
    return pretrained, Choice(tuple(rows), lora=LoraSettings(2.0), head_modules=tuple(heads), task=task)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_predictions_hold(architecture: str, choice: str):
    pretrained, plan = model_and_choice(architecture, CHOICES[choice], 2 if choice.startswith("nothing") else 0)
    result = compare_costs(plan, pretrained, PROFILE, batch_size=4, sequence_length=32, seconds=0.01)
    assert result["trainable_params"].predicted == result["trainable_params"].measured > 0
    assert result["flops"].relative_error == pytest.approx(0.0, abs=1e-9)
    # Operations' own scratch space is in the measurement alone; the demand on the whole is 10 %.
    assert abs(result["step_memory_above_weights_gb"].relative_error) < 0.1
    assert abs(result["step_memory_gb"].relative_error) < 0.1
    assert result["step_ms"].predicted > 0.0


def test_a_trace_runs_nothing_and_changes_nothing():
    pretrained, _ = model_and_choice("bert", {}, 0)
    model = pretrained.model.train()
    weight = model.bert.encoder.layer[2].output.dense.weight.requires_grad_(True)
    weight.grad = torch.ones_like(weight)
    before, random = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    ids = torch.ones(2, 8, dtype=torch.long)
    trace = trace_step(model, {"input_ids": ids, "labels": torch.zeros(2, dtype=torch.long)})
    assert trace.flops > 0
    assert trace.peak_bytes > weight.numel() * 4
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_peak_memory_is_that_of_the_allocator():
    """Two of three tensors of 4 MB live at one time."""

    def work() -> None:
        for _ in range(2):
            first = torch.zeros(2**20)
            second = first + 1.0
            del first
        del second

    assert peak_bytes(work) == pytest.approx(3 * 4 * 2**20, rel=0.01)  # the loop's second turn still holds one


def test_rates_and_profile_file(tmp_path: Path):
    assert PROFILE.operation_ms(TracedOperation(MATMUL, 1e9, 1e9)) == pytest.approx(0.001 + 10.0 + 100.0)
    assert PROFILE.operation_ms(TracedOperation(MEMORY, 0.0, 2e9)) == pytest.approx(0.001 + 200.0)
    path = save_profile(PROFILE, tmp_path / "device.json")
    assert load_profile(path) == PROFILE
    assert load_profile(tmp_path / "none.json") is None
    path.write_text("{}")
    with pytest.raises(OutputError, match=r"not a device profile .*layerlens calibrate"):
        load_profile(path)


def test_relative_error_of_nothing_is_nothing():
    assert Comparison(0.0, 0.0).relative_error == 0.0
    assert Comparison(110.0, 100.0).relative_error == pytest.approx(0.1)


def test_tasks_without_tokens_are_refused():
    pretrained, plan = model_and_choice("bert", {}, 0)
    plan = dataclasses.replace(plan, task="image-classification")
    with pytest.raises(ManifestError, match="not for image-classification"):
        compare_costs(plan, pretrained, PROFILE, batch_size=2, sequence_length=8)


def test_commands(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from layerlens.config import RunConfig
    from layerlens.pipeline import run_config

    monkeypatch.setattr("layerlens.jobs.costs.calibrate", lambda progress, cpu_time: PROFILE)
    path = str(run_config(RunConfig(**settings), base_dir=tmp_path).files["manifest_json"])
    cache = ["--cache-dir", str(tmp_path), "--threads", "1"]
    done = CliRunner().invoke(app, ["calibrate", *cache])
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "latency_profile: {peak_gflops: 100, memory_bandwidth_gb_s: 10, op_overhead_us: 1}\n"
    done = CliRunner().invoke(app, ["evaluate", path, "--costs", "--json", *cache])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["trainable_params"]["relative_error"] == 0.0
    assert abs(found["flops"]["relative_error"]) < 0.02
    for each in (found, found["uniform_lora"]):
        memory = each["step_memory_gb"]
        assert 1.0 <= memory["predicted"] / memory["measured"] < 1.1
        assert each["trainable_params"]["relative_error"] == 0.0
        parts = [each[name]["measured"] for name in ("forward_ms", "backward_ms", "optimizer_ms")]
        assert min(parts) > 0.0
        assert each["step_ms"]["predicted"] > 0.0
    assert found["uniform_lora"]["trainable_params"]["predicted"] <= found["trainable_params"]["predicted"]
    # The prediction is the manifest's, but for the rates of the device.
    uses = {use["resource"]: use for use in json.loads(Path(path).read_text(encoding="utf-8"))["resources"]}
    assert found["step_memory_gb"]["predicted"] == pytest.approx(uses["vram_gb"]["total"], rel=0.02)
    shown = CliRunner().invoke(app, ["evaluate", path, "--costs", "--batch-size", "2", *cache])
    for part in (
        "Costs of 2 × 16 tokens",
        "of it optimiser",
        "Uniform LoRA with the same number of parameters",
        "Beside it, ",
    ):
        assert part in shown.stderr
    refused = CliRunner().invoke(app, ["evaluate", path])
    assert (refused.exit_code, "give --costs" in refused.stderr) == (2, True)
