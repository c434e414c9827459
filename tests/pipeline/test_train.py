"""``layerlens train``: from a manifest to a trained directory, also after a kill, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from layerlens.cli.main import app
from layerlens.config import RunConfig
from layerlens.manifest import read_manifest
from layerlens.pipeline import run_config
from layerlens.sources import load_pretrained
from layerlens.tuning import load

TRAINING = {"epochs": 3, "batch_size": 4, "save_every": 5, "learning_rate": 5e-3}

KILLED_AFTER_A_CHECKPOINT = """
import os, signal
from layerlens.cli.start import main
from layerlens.tuning import checkpoints

write = checkpoints.atomic_write_text

def write_and_die(path, text):
    write(path, text)
    if path.name == checkpoints.PROGRESS_FILE:
        os.kill(os.getpid(), signal.SIGKILL)

checkpoints.atomic_write_text = write_and_die
main()
"""


@pytest.fixture(scope="module")
def job(_session_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: config.yaml and out/manifest.json."""
    folder = tmp_path_factory.mktemp("job")
    settings = {**_session_settings, "training": TRAINING}
    every_method = {"min_layers": {"lora": 1, "adapter": 1, "prefix": 1}}
    settings["optimization"] = {**settings["optimization"], "constraints": every_method}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    run_config(RunConfig(**settings), base_dir=folder)
    return folder


def train(job: Path, output: Path, *more: str) -> Result:
    arguments = ["train", str(job / "out/manifest.json"), "-c", str(job / "config.yaml"), "-o", str(output), *more]
    return CliRunner().invoke(app, arguments)


def without_timing(output: Path) -> dict[str, Any]:
    facts = json.loads((output / "metrics.json").read_text())
    del facts["measured"]
    return facts


def test_killed_and_run_again_it_writes_the_same_bytes(job: Path, warm_python: Any, tmp_path: Path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = train(job, whole, "--json")
    assert done.exit_code == 0, done.stderr
    command = ["train", str(job / "out/manifest.json"), "-q", "-c", str(job / "config.yaml"), "-o", str(cut)]
    killed = warm_python.run("-c", KILLED_AFTER_A_CHECKPOINT, *command)
    assert killed.returncode == -signal.SIGKILL
    assert not (cut / "metrics.json").exists()
    again = train(job, cut, "--json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["training"]["resumed_from"] == 5
    assert without_timing(whole) == without_timing(cut)
    names = {path.name for path in whole.iterdir()}
    assert names == {path.name for path in cut.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "layerlens_modules.safetensors"} <= names
    for name in names - {"metrics.json"}:
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name


def test_result_learns_loads_again_and_says_what_it_took(job: Path, tmp_path: Path, reviews_jsonl: Path):
    done = train(job, tmp_path / "tuned")
    assert done.exit_code == 0, done.stderr
    for words in ("On the test split", "tokens per second", "inference, one batch: with its options"):
        assert words in done.stderr
    facts = json.loads((tmp_path / "tuned/metrics.json").read_text())
    assert facts["after"]["loss"] < facts["before"]["loss"]
    assert {"accuracy", "f1", "mcc"} <= facts["after"].keys()
    manifest = read_manifest(job / "out/manifest.json")
    head = 32 * 2 + 2  # of the tiny model: hidden size × classes, and a bias for each
    chosen = sum(row.cost for row in manifest.allocations)
    assert facts["training"]["trained_parameters"] == chosen + head
    measured = facts["measured"]
    assert all(measured[key] > 0 for key in ("wall_seconds", "tokens_per_second", "peak_memory_gb"))
    assert set(measured["inference_ms"]) == {"before", "after"}
    assert not (tmp_path / "tuned/checkpoints").exists()

    def logits() -> torch.Tensor:
        labels, name = manifest.model.labels, manifest.model.name_or_path
        base = load_pretrained(name, "sequence-classification", labels, seed=manifest.provenance.seed)
        model = load(base.model, tmp_path / "tuned")
        with torch.no_grad():
            return model(**base.tokenizer("great lovely thing 3", return_tensors="pt")).logits

    assert torch.equal(logits(), logits())
    assert int(logits().argmax()) == manifest.model.labels.index("good")


def test_without_a_configuration_it_takes_that_of_the_run(job: Path, tmp_path: Path):
    arguments = ["train", str(job / "out/manifest.json"), "-o", str(tmp_path), "--set", "training.max_steps=2", "-q"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    assert without_timing(tmp_path)["training"]["steps"] == 2
    assert without_timing(tmp_path)["config"]["learning_rate"] == TRAINING["learning_rate"]


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"model": {"fingerprint": "ab" * 32}}, 2, "not the weights that the manifest was made for"),
        (
            {"model": {"labels": ["good", "evil"]}},
            4,
            "classes (bad, good) cannot be matched with the 2 of the manifest",
        ),
        ({"model": {"task": ""}}, 2, "the manifest has no model.task"),
        ({"model": {"name_or_path": "nowhere/at/all"}}, 4, "no model directory at"),
    ],
)
def test_a_manifest_that_does_not_fit(job: Path, tmp_path: Path, change: dict[str, Any], code: int, words: str):
    document = json.loads((job / "out/manifest.json").read_text())
    document["model"].update(change["model"])
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(document))
    done = CliRunner().invoke(app, ["train", str(path), "-c", str(job / "config.yaml"), "-o", str(tmp_path / "t")])
    assert (done.exit_code, list((tmp_path / "t").glob("*"))) == (code, [])
    assert words in done.stderr.replace("\n", " ")


def test_a_manifest_without_its_configuration(job: Path, tmp_path: Path):
    document = json.loads((job / "out/manifest.json").read_text())
    del document["provenance"]["config"]
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(document))
    done = CliRunner().invoke(app, ["train", str(path)])
    assert done.exit_code == 2
    assert "give one with -c CONFIG" in done.stderr


def test_everything_that_is_written_can_be_read_by_whom_the_umask_lets(job: Path, tmp_path: Path):
    before = os.umask(0o022)
    try:
        done = train(job, tmp_path / "tuned", "--set", "training.max_steps=1", "-q")
    finally:
        os.umask(before)
    assert done.exit_code == 0, done.stderr
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "tuned").rglob("*") if path.is_file()}
    assert "adapter_model.safetensors" in modes
    assert set(modes.values()) == {0o644}, modes
