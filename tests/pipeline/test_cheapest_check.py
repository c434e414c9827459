"""The proxy check of ``objective: cheapest``: what is trained, which choice is kept, and when nothing is saved."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from layerlens.config import RunConfig
from layerlens.jobs.cheapest_check import kept_share
from layerlens.jobs.explained import explained, solution_of
from layerlens.jobs.proxies import ProxyTrainer
from layerlens.manifest import read_manifest
from layerlens.manifest.summary import worth
from layerlens.pipeline import run_config
from layerlens.profiling.statistics_file import load_statistics

OPTIMIZATION: dict[str, Any] = {
    "max_trainable_params": 4000, "methods": ["lora"], "lora_ranks": [1, 2, 4], "objective": "cheapest",
    "quality_margin": 0.1, "check_predictions": False,
    "latency_profile": {"batch_size": 2, "sequence_length": 16, "peak_gflops": 100, "memory_bandwidth_gb_s": 20},
    "proxy_check": {"steps": 2, "train_samples": 32, "held_out_samples": 16},
}  # fmt: skip
LAYERS = 12
"""That take LoRA; uniform LoRA, and the choice by score where the budget pays for all, adapt them all."""


@pytest.fixture
def run(settings, tmp_path):
    settings["optimization"] = OPTIMIZATION
    settings["training"] = {"max_steps": 6}
    return lambda: run_config(RunConfig.model_validate(settings), base_dir=tmp_path)


def gains(monkeypatch: pytest.MonkeyPatch, kept: Any, noise: float = 0.01) -> list[tuple[int, int]]:
    """Let ``kept`` say from the number of adapted layers which share of uniform LoRA's gain a choice keeps.

    Returns (steps, adapted layers) of each training.
    """
    trained: list[tuple[int, int]] = []

    def drops(self: ProxyTrainer, choice: Any, learning_rate: float, **options: Any) -> np.ndarray:
        ranks = [row.rank for row in choice.options if row.rank]
        trained.append((len(self.batches), len(ranks)))
        n = len(self.base_losses)
        share = 1.0 if len(ranks) == LAYERS else kept(len(ranks))
        return share * np.linspace(0.5, 1.5, n) + noise * np.cos(np.arange(n) * (1 + len(ranks)))

    monkeypatch.setattr(ProxyTrainer, "drops", drops)
    return trained


def test_the_cheapest_within_the_margin_is_kept(run, monkeypatch):
    trained = gains(monkeypatch, lambda adapted: 0.97)
    result = run()
    facts, saving = result.manifest.provenance.proxy_check, result.manifest.predicted.cheapest
    candidates = {name: fact for name, fact in facts.items() if isinstance(fact, dict) and "cost_share" in fact}
    assert len(candidates) >= 2
    assert facts["chosen"] == min(candidates, key=lambda name: candidates[name]["cost_share"])
    assert saving.saves
    assert saving.written == "cheapest"
    assert saving.measured["asked"] == 0.9
    assert 0.9 <= saving.measured["kept_low"] < saving.measured["kept"] < saving.measured["kept_high"]
    assert {steps for steps, _ in trained} == {3}  # half of six, where two were asked for
    assert any("2 are fewer than half of the fine-tune's 6" in line for line in result.warnings)
    assert any(f"{facts['chosen']} is written. It kept 9" in line for line in result.warnings)
    assert re.search(r"kept 9\d % of uniform LoRA's held-out loss drop when both were tr", worth(result.manifest))
    assert read_manifest(result.files["manifest_json"]) == result.manifest


def test_a_cheaper_one_outside_the_margin_is_not(run, monkeypatch):
    adapted: list[int] = []
    gains(monkeypatch, lambda count: adapted.append(count) or (0.97 if count >= max(adapted) else 0.6))
    facts = run().manifest.provenance.proxy_check
    costs = {
        name: fact["cost_share"] for name, fact in facts.items() if isinstance(fact, dict) and "cost_share" in fact
    }
    assert facts["chosen"] in costs
    assert costs[facts["chosen"]] > min(costs.values())


@pytest.mark.parametrize(
    ("kept", "noise", "reason"),
    [
        (0.5, 0.01, "no cheaper choice is within the margin: the nearest, cheapest-"),
        (0.92, 0.5, "the whole interval must be at least 90%"),  # within by its mean, not by its interval
    ],
)
def test_nothing_is_saved_where_none_is_within(run, monkeypatch, kept, noise, reason):
    gains(monkeypatch, lambda adapted: kept, noise)
    result = run()
    saving = result.manifest.predicted.cheapest
    assert not saving.saves
    assert saving.written in ("score", "uniform-lora")
    assert result.manifest.provenance.proxy_check["chosen"] == saving.written
    assert reason in saving.reason
    assert worth(result.manifest).startswith("Nothing to save: after 3 steps")
    assert any("nothing to save" in line for line in result.warnings)
    spec, statistics = load_statistics(result.files["statistics"])
    row = next(row for row in result.manifest.allocations if row.method == "lora")
    assert str(explained(solution_of(result.manifest, spec, statistics), row.layer))


def test_uniform_lora_that_learns_nothing_saves_nothing(run, monkeypatch):
    monkeypatch.setattr(ProxyTrainer, "drops", lambda self, *_, **__: -np.linspace(0.1, 0.2, len(self.base_losses)))
    assert "does not fall in 3 steps" in run().manifest.predicted.cheapest.reason


def test_the_interval_of_a_ratio_holds_it_nineteen_times_in_twenty():
    """600 draws: 0.95 ± 3 standard errors of 0.009."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(600):
        of = rng.normal(1.0, 0.5, 64)
        share = kept_share(0.9 * of + rng.normal(0.0, 0.2, 64), of)
        inside += share["kept_low"] <= 0.9 <= share["kept_high"]
    assert 0.92 <= inside / 600 <= 0.98
    alike = kept_share(of, of)
    assert alike["kept_low"] == alike["kept"] == alike["kept_high"] == 1.0
