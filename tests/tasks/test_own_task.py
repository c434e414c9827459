"""A task that is registered from outside goes the whole way: validated, measured, trained and judged by its metric."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner
from word_count import WORD_COUNT

from layerlens.cli.main import app
from layerlens.config import DataConfig, RunConfig
from layerlens.data import load_dataset
from layerlens.exceptions import ConfigurationError
from layerlens.jobs.costs import synthetic_batch
from layerlens.jobs.train import train_manifest
from layerlens.manifest import read_manifest
from layerlens.pipeline import run_config
from layerlens.registry import TASKS
from layerlens.sources import load_pretrained
from layerlens.tasks import make_batches
from layerlens.tuning.recipes import python_snippet

NAME = WORD_COUNT.name
WORDS = ["one", "of", "many", "words", "that", "make", "a", "text", "long", "and", "then", "longer", "still"]


@pytest.fixture
def registered() -> Iterator[None]:
    TASKS.register(NAME, WORD_COUNT)
    yield
    TASKS.unregister(NAME)


@pytest.fixture
def config_file(tmp_path: Path, tiny_bert_dir: Path) -> Path:
    """Texts of 1 to 12 words, and a job on them."""
    rows = [{"text": " ".join([f"{n}", *WORDS[: n % 12]])} for n in range(80)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "model": {"name_or_path": str(tiny_bert_dir), "task": NAME, "head_fit_samples": 16},
        "data": {"source": "texts.jsonl", "calibration_samples": 16, "max_length": 16, "batch_size": 8},
        "optimization": {
            "max_trainable_params": 1500,
            "lora_ranks": [1, 2],
            "methods": ["lora"],
            "latency_profile": {"batch_size": 2, "sequence_length": 16},
        },
        "training": {"max_steps": 40, "batch_size": 8, "learning_rate": 2e-2, "eval_every": 10, "seed": 0},
        "runtime": {"threads": 1, "cache_dir": "cache"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.mark.usefixtures("registered")
def test_it_is_measured_trained_and_judged_as_the_built_in_ones(config_file: Path):
    assert CliRunner().invoke(app, ["validate", str(config_file)]).exit_code == 0
    folder, config = config_file.parent, RunConfig(**yaml.safe_load(config_file.read_text()))
    result = run_config(config, base_dir=folder)
    assert result.measured["step_zero_max_abs_delta"] == 0.0
    assert any(row.method == "lora" for row in result.manifest.allocations)
    path = result.directory / "manifest.json"
    assert "AutoModelForSequenceClassification.from_pretrained" in python_snippet(read_manifest(path), path, None)
    assert "num_labels=1" in python_snippet(read_manifest(path), path, None)
    trained = train_manifest(path, config, base_dir=folder, output=folder / "tuned")
    assert trained.before.keys() == trained.after.keys() == {"loss", "words_off"}
    assert trained.after["words_off"] < trained.before["words_off"]
    evaluations = trained.training.evaluations
    best = min(evaluations, key=lambda evaluation: evaluation["words_off"])  # the lower, the better
    assert trained.after["words_off"] == pytest.approx(best["words_off"], rel=1e-4)


@pytest.mark.usefixtures("registered")
def test_its_loss_is_its_own_and_its_costs_can_be_measured(config_file: Path, tiny_bert_dir: Path):
    config = DataConfig(source="texts.jsonl", max_length=16)
    dataset = load_dataset(config, config_file.parent, NAME)
    assert dataset.labels[:3] == (1, 2, 3)
    pretrained = load_pretrained(str(tiny_bert_dir), NAME, dataset.label_names)
    (batch,) = make_batches(WORD_COUNT, pretrained, dataset.select([5, 2]), config, batch_size=2)
    logits = pretrained.model(**batch.inputs).logits
    assert logits.shape == (2, 1)
    rate = logits[:, 0].exp()
    expected = rate - torch.tensor([3.0, 6.0]) * logits[:, 0]  # the shortest first
    torch.testing.assert_close(WORD_COUNT.loss(logits, batch), expected)
    made = synthetic_batch(pretrained.model, NAME, 2, 7)
    assert made["labels"].tolist() == [7.0, 7.0]


def test_names_are_known_without_it_and_a_wrong_one_is_said(config_file: Path):
    done = CliRunner().invoke(app, ["validate", str(config_file)])
    assert done.exit_code == 2
    assert f"got {NAME}" in " ".join(done.stderr.split())
    TASKS.register(NAME, WORD_COUNT)
    try:
        with pytest.raises(ConfigurationError, match=r"model\.task: .*'word-count'.* 'word-cuont'"):
            RunConfig(**yaml.safe_load(config_file.read_text().replace(NAME, "word-cuont")))
    finally:
        TASKS.unregister(NAME)


def test_a_configuration_is_checked_without_importing_torch(config_file: Path):
    """The task's own columns are looked for in the data all the same."""
    settings = yaml.safe_load(config_file.read_text())
    settings["model"]["task"] = "regression"
    settings["data"]["label_column"] = "words"
    config_file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    (config_file.parent / "texts.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(WORDS[: n % 12 + 1]), "words": n % 12 + 1}) + "\n" for n in range(80)),
        encoding="utf-8",
    )
    code = (
        "import sys; from layerlens.cli.main import app; from layerlens.registry import TASKS\n"
        f"app(['validate', {str(config_file)!r}], standalone_mode=False)\n"
        "assert 'regression' in TASKS.names()\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=1800, capture_output=True, text=True)
    assert "label from 'words'" in done.stderr
