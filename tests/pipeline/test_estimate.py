"""``layerlens estimate``: costs from a configuration alone, held against PEFT, the run and arithmetic."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, BertConfig, LlamaConfig, LlamaForCausalLM, ResNetConfig, ViTConfig
from typer.testing import CliRunner

from layerlens.cli.main import app
from layerlens.exceptions import ConfigurationError, ManifestError
from layerlens.jobs.estimate import Batch, estimate, estimate_manifest
from layerlens.manifest import read_manifest
from layerlens.profiling.statistics_file import load_statistics

WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
LLAMA = LlamaConfig(vocab_size=50, **WIDTHS, num_key_value_heads=2, max_position_embeddings=256,
                    architectures=["LlamaForCausalLM"])  # fmt: skip


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    LLAMA.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def manifest(saved_statistics: Path):
    return read_manifest(saved_statistics.parent / "manifest.json")


@pytest.fixture
def without_weights(manifest, tmp_path: Path) -> str:
    """A directory that has nothing of the manifest's model but config.json."""
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(Path(manifest.model.name_or_path) / "config.json", folder)
    return str(folder)


def layerlens(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_choice_of_a_run_costs_what_its_manifest_says(manifest, without_weights):
    found = estimate(manifest, model=without_weights)
    for ours, recorded in zip(found.resources, manifest.resources, strict=True):
        assert (ours.resource, ours.source) == (recorded.resource, recorded.source)
        for part in ("base", "added", "total"):
            assert getattr(ours, part) == pytest.approx(getattr(recorded, part), rel=1e-14)
    assert found.base_params == manifest.model.total_params
    assert found.head_params == 2 * 32 + 2  # a classifier of two classes on 32 features
    assert found.task == "sequence-classification"


def test_another_batch_is_what_optimize_would_say(manifest, without_weights, saved_statistics, settings, tmp_path):
    """Costs per token are those of the measured length; another batch size and device change the rest alone."""
    from layerlens.config import RunConfig
    from layerlens.cost import cost_table
    from layerlens.models import Option

    profile = {"batch_size": 5, "sequence_length": 16, "device_type": "gpu"}
    settings["optimization"]["latency_profile"] = profile
    spec, statistics = load_statistics(saved_statistics)
    options = [Option(row.layer, row.method, row.rank) for row in manifest.allocations]
    costs = cost_table(spec, statistics, options, RunConfig.model_validate(settings).optimization)
    found = estimate_manifest(manifest, model=without_weights, batch=Batch(5, None, "gpu"))
    assert (found.batch_size, found.sequence_length, found.device) == (5, 16, "gpu")
    totals = costs.total(np.arange(len(options)))
    for use in found.resources:
        assert use.base == pytest.approx(costs.frozen[use.resource], rel=1e-14)
        assert use.total == pytest.approx(totals[use.resource], rel=1e-14)
    longer = estimate_manifest(manifest, model=without_weights, batch=Batch(5, 32))
    of_a_sample = 2 * 32 * 32 + 2 * 32 * 2  # the pooler and the classifier, whatever the length
    of_attention = 2 * 4 * 16 * 16 * 32  # two blocks, two products: four times as many for twice the length
    assert longer.base_flops == 2 * found.base_flops - 5 * of_a_sample + 5 * 2 * of_attention
    assert "full sequences of 32 tokens" in longer.notes[0]


@pytest.mark.parametrize("targets", ["all", "q_proj,v_proj"])
def test_parameters_are_those_of_peft(llama: Path, targets: str):
    with torch.device("meta"):
        model = LlamaForCausalLM(LLAMA)
    wanted = "all-linear" if targets == "all" else targets.split(",")
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=wanted))
    trained = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
    for place in (llama, llama / "config.json"):
        result = layerlens("estimate", "--model", place, "--rank", 4, "--targets", targets, "--json")
        assert result.exit_code == 0, result.stderr
        told = json.loads(result.stdout)
        assert told["resources"][0]["added"] == trained
        assert told["base_params"] == sum(parameter.numel() for parameter in LlamaForCausalLM(LLAMA).parameters())
        assert (told["task"], told["head_params"], told["batch_size"], told["sequence_length"]) == (
            "causal-lm", 0, 8, 128,
        )  # fmt: skip


def test_precision_and_batch_change_the_memory(llama: Path):
    full = estimate(llama, rank=2)
    half = estimate(llama, rank=2, dtype="bfloat16")
    small = estimate(llama, rank=2, batch_size=1, sequence_length=16)
    vram = [next(use for use in one.resources if use.resource == "vram_gb") for one in (full, half, small)]
    assert vram[1].base < vram[0].base
    assert vram[2].total < vram[0].total / 8
    assert full.trainable_params == half.trainable_params == small.trainable_params


def test_models_of_images(tmp_path: Path):
    ViTConfig(**WIDTHS, image_size=8, patch_size=4, architectures=["ViTForImageClassification"]).save_pretrained(
        tmp_path / "vit"
    )
    found = estimate(tmp_path / "vit", rank=2, classes=5)
    assert (found.task, found.sequence_length, found.head_params) == ("image-classification", 0, 5 * 16 + 5)
    assert found.trainable_params == 2 * 2 * (4 * (16 + 16) + (16 + 24) + (24 + 16))
    ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]).save_pretrained(tmp_path / "resnet")
    net = estimate(tmp_path / "resnet", rank=2, task="image-classification")
    assert net.base_flops > 0
    assert net.trainable_params > 0


def test_it_shows_itself(llama: Path):
    found = estimate(llama, rank=2, targets=["q_proj"])
    text, page = str(found), found._repr_html_()
    for one in (text, page):
        assert "LoRA 2 on 2 of 14 layers (q_proj)" in one
        assert "roofline with nominal cpu figures" in one
        assert "exact, from shapes" in one
    assert "<table>" in page
    assert json.loads(json.dumps(found.to_dict()))["choice"] == "LoRA 2 on 2 of 14 layers (q_proj)"
    shown = layerlens("estimate", "--model", llama, "--rank", 2, "--targets", "q_proj")
    assert (shown.exit_code, shown.stdout, shown.stderr) == (0, "", text + "\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give a manifest, or --model and --rank"),
        (["--model", "llama"], 2, "give a manifest, or --model and --rank"),
        (["out", "--rank", "4"], 2, "--rank is for uniform LoRA"),
        (["--model", "llama", "--rank", "4", "--targets", "query"], 2, "is named 'query'; known: q_proj, k_proj"),
        (["--model", "llama", "--rank", "4", "--task", "x"], 2, "--task: got 'x'; choose from sequence-classification"),
        (["--model", "llama", "--rank", "4", "--device", "tpu"], 2, "--device: got 'tpu'; choose from cpu, gpu"),
        (["--model", "llama", "--rank", "4", "--sequence-length", "257"], 2, "has 256 positions; use at most 256"),
        (["--model", "llama", "--rank", "4", "--task", "masked-lm"], 2, "has no model for masked-lm"),
        (["--model", "nameless", "--rank", "4"], 2, "names no class, which says no task; give one of"),
        (["--model", "nothing/here/at/all", "--rank", "4"], 4, "no model directory at nothing/here/at/all"),
        (["--model", "empty", "--rank", "4"], 4, "empty has no config.json"),
        (["--model", "broken", "--rank", "4"], 4, "cannot read the configuration of 'broken'"),
        (["--model", "strange", "--rank", "4"], 4, "cannot read the configuration of 'strange'"),
        (["--model", "timm:resnet18", "--rank", "4", "--task", "image-classification"], 2, "is built in memory by"),
        (["nothing"], 2, "nothing: no such file"),
    ],
)
def test_what_cannot_be_estimated(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str
):
    monkeypatch.chdir(tmp_path)
    BertConfig(**WIDTHS).save_pretrained("nameless")
    for folder, text in (("broken", "{"), ("strange", '{"model_type": "of-tomorrow"}')):
        Path(folder).mkdir()
        Path(folder, "config.json").write_text(text)
    Path("empty").mkdir()
    result = layerlens("estimate", *arguments)
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    assert message in result.stderr


def test_a_manifest_of_another_model(manifest, without_weights, llama):
    with pytest.raises(ManifestError, match="has no such layer; the manifest is of another model"):
        estimate(
            dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, task="causal-lm")), model=str(llama)
        )
    config = AutoConfig.from_pretrained(without_weights)
    config.intermediate_size = 48
    config.save_pretrained(without_weights)
    with pytest.raises(ManifestError, match="it was made for a model of another shape"):
        estimate(manifest, model=without_weights)
    with pytest.raises(ConfigurationError, match="rank: a manifest has its own ranks"):
        estimate(manifest, rank=4)
