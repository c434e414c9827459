"""``objective: cheapest`` in the whole job: what is written, what it says, and what goes on from it."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from rich.console import Console

import layerlens
from layerlens.cli.tables import show
from layerlens.config import RunConfig
from layerlens.exceptions import ConfigurationError
from layerlens.jobs.explained import explained, solution_of
from layerlens.manifest import read_manifest
from layerlens.manifest.summary import proof, worth
from layerlens.pipeline import optimize_statistics, run_config
from layerlens.profiling.statistics_file import load_statistics, statistics_to_bytes

CHEAPEST = {
    "max_trainable_params": 4000, "methods": ["lora"], "lora_ranks": [1, 2, 4], "objective": "cheapest",
    "latency_profile": {"batch_size": 2, "sequence_length": 16, "peak_gflops": 100, "memory_bandwidth_gb_s": 20},
}  # fmt: skip


def config_of(settings: dict[str, Any], **optimization: Any) -> RunConfig:
    settings["optimization"] = {**CHEAPEST, **optimization}
    return RunConfig.model_validate(settings)


@pytest.fixture(scope="module")
def run_once(_session_settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cheapest")
    return run_config(config_of(dict(_session_settings), quality_margin=0.5), base_dir=folder)


def test_a_run_writes_the_cheapest_and_says_what_it_saves(run_once):
    manifest = run_once.manifest
    saving = manifest.predicted.cheapest
    assert saving.saves
    assert saving.kept_share >= 0.5
    assert saving.least_cost_share <= saving.cost_share < 1.0
    assert saving.minimised == {"step_ms": 1.0}
    low, high = saving.kept_interval
    assert 0.0 <= low < saving.kept_share <= high
    step = next(use for use in manifest.resources if use.resource == "step_ms")
    assert step.total / saving.uniform_lora["step_ms"] == pytest.approx(saving.cost_share)
    assert manifest.utility_model == "energy"
    assert {use.resource for use in manifest.resources} == {
        "trainable_params", "flops", "vram_gb", "latency_ms", "step_ms"
    }  # fmt: skip
    assert read_manifest(run_once.files["manifest_json"]) == manifest
    assert read_manifest(run_once.files["manifest_yaml"]) == manifest

    assert re.search(r"keep \d+ % of uniform LoRA's improvement; at least 50 % was required", worth(manifest))
    assert re.search(r"kept \d+ % to \d+ % in nine of ten cases of our study", worth(manifest))
    assert re.search(r"\d+ % less time a step", worth(manifest))
    assert "no choice within the budgets that keeps 50 % of uniform LoRA's" in proof(manifest)
    console = Console(record=True, width=240)
    show(run_once, console)
    shown = " ".join(console.export_text().split())
    page = run_once.files["report"].read_text(encoding="utf-8")
    for sentence in (worth(manifest), proof(manifest)):
        assert sentence in shown
        assert sentence.replace("'", "&#39;") in page


def test_it_is_explained_and_chosen_again_from_its_statistics(run_once, tmp_path, settings):
    spec, statistics = load_statistics(run_once.files["statistics"])
    again = solution_of(run_once.manifest, spec, statistics)
    row = next(row for row in run_once.manifest.allocations if row.method == "lora")
    told = explained(again, row.layer)
    assert "improvement_given_up" in told.prices
    assert str(told)
    optimized = optimize_statistics(
        run_once.files["statistics"], config_of(settings, quality_margin=0.5), base_dir=tmp_path
    )
    assert optimized.manifest.allocations == run_once.manifest.allocations


def test_a_frontier_is_of_the_score(run_once, settings):
    from layerlens.jobs.frontier import traced

    spec, statistics = load_statistics(run_once.files["statistics"])
    config = config_of(settings, quality_margin=0.5)
    found = traced(spec, statistics, config, "step_ms", points=2)
    assert found == traced(spec, statistics, config.by_score(), "step_ms", points=2)
    assert all(row.score > 0.0 for row in found.rows)


def test_nothing_to_save_writes_uniform_lora(run_once, tmp_path, settings):
    config = config_of(settings, quality_margin=0.0, lora_ranks=[1], minimise="trainable_params")
    manifest = optimize_statistics(run_once.files["statistics"], config, base_dir=tmp_path).manifest
    assert not manifest.predicted.cheapest.saves
    assert {row.rank for row in manifest.allocations if row.method == "lora"} == {1}
    assert all(row.method == "lora" for row in manifest.allocations if row.cost or row.method != "none")
    assert manifest.solver == "uniform-lora"
    assert worth(manifest).startswith("Nothing to save: ")
    assert "of its trainable parameters" in worth(manifest)


def test_a_program_says_it_by_keywords(run_once):
    statistics = str(run_once.files["statistics"])
    plan = layerlens.choose(
        statistics, max_trainable_params=4000, objective="cheapest", quality_margin=0.5, minimise="vram_gb",
        lora_ranks=(1, 2, 4), latency_profile=CHEAPEST["latency_profile"],
    )  # fmt: skip
    assert "uniform LoRA's improvement" in str(plan) or "Nothing to save" in str(plan)
    with pytest.raises(ConfigurationError, match="quality_margin belongs to another objective"):
        layerlens.choose(statistics, max_trainable_params=4000, quality_margin=0.5)


def test_time_that_is_not_predicted_cannot_be_least(run_once, tmp_path, settings):
    spec, statistics = load_statistics(run_once.files["statistics"])
    without = tmp_path / "without.safetensors"
    without.write_bytes(statistics_to_bytes(spec, dataclasses.replace(statistics, step=None)))
    with pytest.raises(ConfigurationError, match=r"optimization\.minimise: the step time of this model is not predict"):
        optimize_statistics(without, config_of(settings), base_dir=tmp_path)
