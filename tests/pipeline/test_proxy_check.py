"""The proxy check in the whole job: candidates are really trained, the best one is written, and it says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerlens.config import RunConfig
from layerlens.data import Dataset
from layerlens.exceptions import DataError, ProfilingError
from layerlens.jobs.proxies import ProxyTrainer
from layerlens.jobs.proxy_check import check_samples
from layerlens.manifest import read_manifest
from layerlens.pipeline import optimize_statistics, run_config


@pytest.fixture
def checked_settings(settings: dict[str, Any]) -> dict[str, Any]:
    settings["optimization"]["proxy_check"] = {
        "steps": 3, "learning_rates": [1e-3, 1e-2], "train_samples": 32, "held_out_samples": 16,
        "candidates": ["uniform-lora"],
    }  # fmt: skip
    return settings


def run(settings: dict[str, Any], base_dir: Path, **options: Any):
    return run_config(RunConfig.model_validate(settings), base_dir=base_dir, **options)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, float]]:
    """One entry for every training: whether all LoRA ranks were alike, and the rate."""
    calls: list[tuple[bool, float]] = []
    real = ProxyTrainer.drops

    def watched(self: ProxyTrainer, choice: Any, learning_rate: float, **options: Any) -> np.ndarray:
        ranks = {row.rank for row in choice.options if row.method == "lora"}
        calls.append((len(ranks) == 1, learning_rate))
        return real(self, choice, learning_rate, **options)

    monkeypatch.setattr(ProxyTrainer, "drops", watched)
    return calls


def better(monkeypatch: pytest.MonkeyPatch, uniform_is_better: bool) -> None:
    """Make one of the two kinds of allocation gain more than the other, whatever training would say."""

    def drops(self: ProxyTrainer, choice: Any, learning_rate: float, **options: Any) -> np.ndarray:
        alike = all(row.method in ("none", "lora") for row in choice.options)
        return np.linspace(0.0, 1.0, len(self.base_losses)) + (alike == uniform_is_better)

    monkeypatch.setattr(ProxyTrainer, "drops", drops)


def test_both_are_trained_at_every_rate_and_kept(checked_settings, tmp_path, trained):
    result = run(checked_settings, tmp_path)
    assert [rate for _, rate in trained] == [1e-3, 1e-2, 1e-3, 1e-2]
    assert {"proxy_check_choice", "proxy_check_uniform-lora"} <= result.measured.keys()
    facts = result.manifest.provenance.proxy_check
    best = max((facts[name]["loss_drop"], name) for name in ("choice", "uniform-lora"))
    assert facts["chosen"] == best[1]
    assert all(facts[name]["standard_error"] > 0 for name in ("choice", "uniform-lora"))
    assert "Proxy check uniform-lora" in result.files["report"].read_text(encoding="utf-8")
    assert run(checked_settings, tmp_path).manifest == result.manifest
    assert len(trained) == 4  # everything was kept


def test_uniform_is_written_where_it_is_better(checked_settings, tmp_path, monkeypatch):
    better(monkeypatch, uniform_is_better=True)
    result = run(checked_settings, tmp_path)
    assert {row.method for row in result.manifest.allocations} <= {"none", "lora"}
    assert result.manifest.solver == "uniform-lora"
    assert result.manifest.upper_bound >= result.manifest.score
    told = [line for line in result.warnings if "uniform-lora is written" in line]
    assert len(told) == 1
    assert "the solver's choice was worse by 1 ± " in told[0]
    assert read_manifest(result.files["manifest_json"]).allocations == result.manifest.allocations


def test_the_choice_stays_where_it_is_better(checked_settings, tmp_path, monkeypatch):
    better(monkeypatch, uniform_is_better=False)
    result = run(checked_settings, tmp_path)
    assert result.manifest.provenance.proxy_check["chosen"] == "choice"
    assert not any("proxy_check" in line for line in result.warnings)
    unchecked = run({**checked_settings, "output": {"directory": "plain"}, "optimization": {
        **checked_settings["optimization"], "proxy_check": {"steps": 0}}}, tmp_path)  # fmt: skip
    assert unchecked.manifest.allocations == result.manifest.allocations


def test_uniform_is_kept_within_its_margin(checked_settings, tmp_path, monkeypatch):
    def drops(self: ProxyTrainer, choice: Any, learning_rate: float, **options: Any) -> np.ndarray:
        alike = all(row.method in ("none", "lora") for row in choice.options)
        return np.linspace(0.9, 1.1, len(self.base_losses)) * (1.0 if alike else advantage)

    monkeypatch.setattr(ProxyTrainer, "drops", drops)
    for advantage, expected in ((1.01, "uniform-lora"), (1.03, "choice")):
        result = run(checked_settings, tmp_path, use_cache=False)
        assert result.manifest.provenance.proxy_check["chosen"] == expected
        assert any("2% of uniform LoRA's loss drop are required" in x for x in result.warnings) == (advantage < 1.02)


def test_other_utility_models_can_be_candidates(checked_settings, tmp_path, trained):
    checked_settings["optimization"]["proxy_check"] |= {
        "candidates": ["signal", "uniform-lora"],
        "learning_rates": [1e-3],
    }
    facts = run(checked_settings, tmp_path).manifest.provenance.proxy_check
    assert {"choice", "signal", "uniform-lora"} <= facts.keys()
    assert len(trained) <= 3


def test_what_cannot_work_says_so(checked_settings, tmp_path):
    saved = run(checked_settings, tmp_path).files["statistics"]
    again = optimize_statistics(
        saved, RunConfig.model_validate(checked_settings | {"output": {"directory": "again"}}), base_dir=tmp_path
    )
    assert any("is made by `layerlens run` only" in line for line in again.warnings)
    with pytest.raises(ValueError, match="must be finite and above 0"):
        RunConfig.model_validate(checked_settings | {"optimization": {
            "max_trainable_params": 9, "proxy_check": {"learning_rates": [0.0]}}})  # fmt: skip
    checked_settings["optimization"]["proxy_check"]["learning_rates"] = [1e30]
    with pytest.raises(ProfilingError, match=r"no candidate's loss was finite.*learning_rates \(they are 1e\+30\)"):
        run(checked_settings, tmp_path)


def make_dataset(count: int) -> Dataset:
    return Dataset({"text": tuple(f"text {n}" for n in range(count))}, tuple(n % 2 for n in range(count)), ("a", "b"))


def test_samples_are_kept_apart(checked_settings) -> None:
    config = RunConfig.model_validate(checked_settings)
    dataset = make_dataset(200)
    measured, head = dataset.split(24, 32, 0)
    train, held_out = check_samples(dataset, config, 24, 32)
    assert (len(train), len(held_out)) == (32, 16)
    test = dataset.split_test()[1]
    texts = [set(part.texts) for part in (train, held_out, head, test)]
    assert all(not a & b for number, a in enumerate(texts) for b in texts[number + 1 :])
    assert set(measured.texts) <= texts[0]
    few_train, few_held_out = check_samples(make_dataset(90), config, 24, 32)
    assert not set(few_train.texts) & set(few_held_out.texts)
    with pytest.raises(DataError, match=r"optimization\.proxy_check: the data leaves \d samples for evaluation"):
        check_samples(make_dataset(20), config, 10, 4)
