"""``layerlens train --baseline``: the manifest's parameters spent another way, through the same command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from layerlens.cli.main import app
from layerlens.config import RunConfig
from layerlens.jobs.baseline import FirstEpoch
from layerlens.models import LoraSettings
from layerlens.pipeline import run_config
from layerlens.sources import load_pretrained
from layerlens.tuning import load
from layerlens.tuning.samples import SeededOrder, TrainingData


@pytest.fixture(scope="module")
def job(_session_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose LoRA begins with principal components."""
    folder = tmp_path_factory.mktemp("job")
    training = {"max_steps": 8, "batch_size": 4, "learning_rate": 5e-3}
    settings = {**_session_settings, "training": training}
    settings["optimization"] = {
        **settings["optimization"], "max_trainable_params": 6000, "methods": ["lora"], "lora_initialization": "pca",
        "use_rslora": True, "constraints": {"min_layers": {"lora": 10}}, "lora_ranks": [2, 4],
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    result = run_config(RunConfig(**settings), base_dir=folder)
    assert result.measured["step_zero_max_abs_delta"] == 0.0
    assert result.manifest.lora == LoraSettings(2.0, use_rslora=True, initialization="pca")
    return folder


def train(job: Path, *more: str):
    return CliRunner().invoke(
        app, ["train", str(job / "out/manifest.json"), "-c", str(job / "config.yaml"), "--json", *more]
    )


def test_the_choice_itself_begins_from_the_exported_components(job):
    done = train(job)
    assert done.exit_code == 0, done.stderr
    (job / "out/peft").rename(job / "out/away")
    refused = train(job, "-o", str(job / "other"))
    (job / "out/away").rename(job / "out/peft")
    assert refused.exit_code == 2
    assert "keep the peft directory beside the manifest" in " ".join(refused.stderr.split())


@pytest.mark.parametrize("name", ["adalora", "truncation", "autolora", "full"])
def test_a_baseline_is_trained_kept_and_described(job, name):
    done = train(job, "--baseline", name)
    assert done.exit_code == 0, done.stderr
    directory = job / f"out/tuned-{name}"
    facts = json.loads((directory / "metrics.json").read_text())
    told = facts["baseline"]
    assert told["name"] == name
    assert 0 < told["budget_params"] <= 6000
    if name not in ("full", "adalora"):
        assert 0 < told["kept_params"] <= told["budget_params"]
    assert {"loss", "accuracy"} <= facts["after"].keys()
    labels = json.loads((job / "out/manifest.json").read_text())["model"]["labels"]
    base = load_pretrained(str(json.loads((job / "out/manifest.json").read_text())["model"]["name_or_path"]),
                           "sequence-classification", labels).model  # fmt: skip
    loaded = load(base, directory)
    assert sum(value.numel() for value in loaded.parameters() if value.requires_grad) > told["kept_params"]


def test_what_a_baseline_kept_is_shown(job, tmp_path):
    command = ["train", str(job / "out/manifest.json"), "-c", str(job / "config.yaml"), "--baseline", "truncation"]
    done = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "tuned"), "--set", "training.max_steps=2"])
    assert done.exit_code == 0, done.stderr
    words = " ".join(done.stderr.split())
    assert "kept by truncation" in words
    assert "truncation: trains rank" in words


def test_an_unknown_baseline_is_refused_at_once(job):
    done = train(job, "--baseline", "adalorra")
    assert done.exit_code == 2
    assert "'adalorra' is not known, did you mean 'adalora'" in " ".join(done.stderr.split())


def test_batches_are_those_of_the_first_epoch():
    data = TrainingData([{"x": torch.tensor([float(index)])} for index in range(10)], [])
    batches = FirstEpoch(data, 4, 3, torch.device("cpu"))
    seen = [int(value) for batch in batches for value in batch["x"].flatten()]
    assert seen == list(SeededOrder(10, 3))
    assert len(batches) == 3
    assert [len(batch["x"]) for batch in batches[1:]] == [4, 2]
