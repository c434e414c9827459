"""A rank rule from outside, by public registration: in `train --baseline`, in `evaluate`, and in a study."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from layerlens.cli.main import app
from layerlens.config import RunConfig
from layerlens.evaluation.results import ResultsFile
from layerlens.evaluation.study import Study
from layerlens.evaluation.study_task import StudyTask
from layerlens.exceptions import ConfigurationError
from layerlens.pipeline import run_config
from layerlens.rank_rules import RankRule, rank_cost
from layerlens.registry import RANK_RULES
from layerlens.tuning.baselines import BASELINES

NAME = "loudest-layer"


def loudest(layers, budget, measured, seed):
    """All that the budget buys to the layer with the largest gradient."""
    layer = max(layers, key=lambda layer: measured["gradient_norm"][layer.name])
    rank = min(budget // rank_cost(layer), layer.n_in, layer.n_out)
    return {layer.name: rank} if rank else {}


@pytest.fixture(autouse=True)
def rule() -> Iterator[None]:
    RANK_RULES.register(NAME, RankRule("everything to the loudest layer", loudest, ("gradient_norm",)))
    yield
    RANK_RULES.unregister(NAME)
    assert NAME not in BASELINES


@pytest.fixture
def config(tiny_bert_dir: Path, reviews_jsonl: Path, tmp_path: Path) -> Path:
    settings = {
        "model": {"name_or_path": str(tiny_bert_dir), "head_fit_samples": 16},
        "data": {"source": str(reviews_jsonl), "calibration_samples": 16, "max_length": 16, "batch_size": 8},
        "optimization": {"max_trainable_params": 600, "methods": ["lora"], "lora_ranks": [1, 2, 4],
                         "latency_profile": {"batch_size": 2, "sequence_length": 16}},
        "training": {"max_steps": 2, "batch_size": 4},
        "study": {"arms": [NAME], "learning_rates": [1e-3, 1e-2], "seeds": 2, "steps": 4, "batch_size": 4,
                  "train_samples": 24, "validation_samples": 8, "test_samples": 8},
        "runtime": {"threads": 1, "cache_dir": "cache"},
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def test_it_is_a_baseline_and_an_arm(config: Path) -> None:
    run_config(RunConfig(**yaml.safe_load(config.read_text(encoding="utf-8"))), base_dir=config.parent)
    manifest = config.parent / "out/manifest.json"
    done = CliRunner().invoke(app, ["train", str(manifest), "-c", str(config), "--json", "--baseline", NAME])
    assert done.exit_code == 0, done.stderr
    told = json.loads((config.parent / f"out/tuned-{NAME}/metrics.json").read_text(encoding="utf-8"))["baseline"]
    assert told["name"] == NAME
    ((method, rank),) = told["options"].values()
    assert method == "lora"
    assert 0 < told["kept_params"] <= told["budget_params"] < told["kept_params"] * (rank + 1) / rank

    done = CliRunner().invoke(app, ["evaluate", str(config), "-o", str(config.parent / "study"), "--json", "--quiet"])
    assert done.exit_code == 0, done.stderr
    assert {row["arm"] for row in json.loads(done.stdout)["arms"]} == {"uniform", NAME}


def test_it_is_an_arm_of_the_study(task: StudyTask, tmp_path: Path) -> None:
    study = Study(task, ResultsFile.open(tmp_path / "tiny.jsonl"), {"tight": 100})
    loud = max(study.quantities["gradient_norm"], key=study.quantities["gradient_norm"].__getitem__)
    assert study.ranks(NAME, 100).keys() == {loud}
    study.run("tight", NAME)
    assert {run["key"] for run in study.results.select(kind="run")} == {study.results.select(kind="arm")[0]["key"]}


def test_a_rule_that_asks_for_what_is_not_measured_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'hessian' is not measured; known: weight_gradient"):
        RankRule("", loudest, ("hessian",))
