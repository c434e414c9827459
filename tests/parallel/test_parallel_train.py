"""``layerlens train`` on two processes ends where one does, and one of the two speaks."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import yaml
from safetensors.torch import load_file

from layerlens.config import RunConfig
from layerlens.pipeline import run_config

TRAINING = {"max_steps": 6, "batch_size": 2, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def job(tiny_bert_dir: Path, reviews_jsonl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a model without dropout, whose masks differ between one process and two."""
    folder = tmp_path_factory.mktemp("job")
    shutil.copytree(tiny_bert_dir, folder / "base")
    config = json.loads((folder / "base/config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "base/config.json").write_text(json.dumps(config))
    settings: dict[str, Any] = {
        "model": {"name_or_path": str(folder / "base"), "head_fit_samples": 32},
        "data": {"source": str(reviews_jsonl), "calibration_samples": 24, "max_length": 16, "batch_size": 8},
        "profiling": {"adapter_sites": "all"},
        "optimization": {
            "max_trainable_params": 1500,
            "latency_profile": {"batch_size": 2, "sequence_length": 16},
            "methods": ["lora", "adapter", "prefix"],
            "lora_ranks": [1, 2, 4],
            "adapter_sizes": [1, 2],
            "prefix_lengths": [2, 4],
            "constraints": {"min_layers": {"lora": 1, "adapter": 1, "prefix": 1}},
        },
        "training": TRAINING,
        "runtime": {"threads": 1, "cache_dir": "cache"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    run_config(RunConfig.model_validate(copy.deepcopy(settings)), base_dir=folder)
    return folder


def without_timing(output: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((output / "metrics.json").read_text())
    del facts["measured"]
    return facts


@pytest.mark.parametrize("more", [(), ("--baseline", "truncation")])
def test_two_processes_end_where_one_does_and_one_of_them_speaks(
    start: Any, job: Path, tmp_path: Path, more: tuple[str, ...]
):
    """Two batches of 2, on two processes or one after the other: the same steps, but for the order of float32 sums."""
    one, two = tmp_path / "one", tmp_path / "two"

    def arguments(output: Path, *rest: str) -> list[str]:
        given = ["train", str(job / "out/manifest.json"), "-c", str(job / "config.yaml"), "-o", str(output), "--json"]
        return [*given, *more, *rest]

    done = ranks.command(*arguments(one, "--set", "training.gradient_accumulation=2"))
    assert done.exit_code == 0, done.stderr
    both = [outcome.value for outcome in start(2, ranks.command, lambda rank: arguments(two))]
    assert [each.exit_code for each in both] == [0, 0], both
    told = json.loads(both[0].stdout)
    assert (both[1].stdout, both[1].stderr) == ("", "")
    assert both[0].stderr.count("Loading model and data") == 1
    assert (told["training"]["processes"], told["training"]["steps"]) == (2, 6)
    alone = without_timing(one)
    assert told["training"]["losses"] == pytest.approx(alone["training"]["losses"], rel=1e-4)
    assert told["after"] == pytest.approx(alone["after"], rel=1e-3)
    assert told["training"]["tokens"] == alone["training"]["tokens"]
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    if not more:  # truncated factors are unique but for signs
        for file in ("adapter_model.safetensors", "layerlens_modules.safetensors"):
            ours, theirs = (load_file(folder / file) for folder in (one, two))
            for name, tensor in ours.items():
                # Adam divides a gradient by its own size, which enlarges what is next to 0
                torch.testing.assert_close(theirs[name], tensor, rtol=1e-2, atol=1e-4)
