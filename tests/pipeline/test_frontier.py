"""The frontier of one budget: what is written agrees with what the solver says at each budget."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from layerlens.config import RunConfig
from layerlens.exceptions import ConfigurationError, InfeasibleError
from layerlens.pipeline import optimize_statistics, run_config, trace_frontier


@pytest.fixture
def config(settings) -> RunConfig:
    settings["optimization"] = {
        key: value for key, value in settings["optimization"].items() if not key.startswith(("max_", "latency_target"))
    } | {"max_trainable_params": 777}
    return RunConfig.model_validate(settings)


def test_the_hull_bounds_what_is_certified_and_touches_it_at_its_own_points(config, saved_statistics, tmp_path):
    result = trace_frontier(saved_statistics, config, "trainable_params", base_dir=tmp_path, points=6)
    budgets = [row.budget for row in result.hull]
    scores = [row.score for row in result.hull]
    assert budgets == sorted(budgets)
    slopes = np.diff(scores) / np.diff(budgets)
    assert np.all(np.diff(slopes) <= 1e-9 * slopes[:-1])
    assert len(result.certified) == 6
    for row in result.certified:
        assert row.status == "optimal"
        assert row.score <= np.interp(row.budget, budgets, scores) * (1 + 1e-9)
    points = [result.hull[1].budget, result.hull[len(result.hull) // 2].budget]
    again = trace_frontier(saved_statistics, config, "trainable_params", base_dir=tmp_path, budgets=points)
    for row, point in zip(again.certified, (result.hull[1], result.hull[len(result.hull) // 2]), strict=True):
        assert row.score == pytest.approx(point.score, rel=1e-6)


def test_a_certified_point_is_what_optimize_finds(config, saved_statistics, tmp_path):
    found = optimize_statistics(saved_statistics, config, base_dir=tmp_path).manifest
    (row,) = trace_frontier(saved_statistics, config, "trainable_params", base_dir=tmp_path, budgets=[777.0]).certified
    assert (row.score, row.gap) == (found.score, found.gap)


@pytest.mark.parametrize("resource", ["trainable_params", "flops", "vram_gb", "latency_ms"])
def test_every_resource_is_written_as_csv_and_svg(config, saved_statistics, tmp_path, resource):
    result = trace_frontier(saved_statistics, config, resource, base_dir=tmp_path, points=3)
    with result.files["frontier_csv"].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    marked = [row.layer for row in result.marked]
    kind = "bound" if resource == "vram_gb" else "hull"  # parts of memory are paid once, and it is a peak
    assert [row["kind"] for row in rows] == [kind] * len(result.hull) + ["certified"] * 3 + ["marked"] * len(marked)
    written = (*result.hull, *result.certified, *result.marked)
    assert [float(row["budget"]) for row in rows] == [row.budget for row in written]
    budgets, scores = [row.budget for row in result.hull], [row.score for row in result.hull]
    assert len(budgets) > 1
    assert budgets == sorted(budgets)
    for row in (*result.certified, *result.marked):
        assert row.score <= np.interp(row.budget, budgets, scores) * (1 + 1e-9)
    assert marked[0].startswith("uniform LoRA")
    assert all(bool(row["method"]) == (kind == "hull") for row in rows[1 : len(result.hull)])
    assert result.files["frontier_svg"].read_text(encoding="utf-8").rstrip().endswith("</svg>")


def test_no_gain_is_a_frontier_of_one_point(settings, tmp_path):
    settings["optimization"]["methods"] = ["prefix"]  # whose gain on this random model is all sampling noise
    settings["profiling"]["utility_model"] = "signal"  # which takes the noise off
    config = RunConfig.model_validate(settings)
    statistics = run_config(config, base_dir=tmp_path).files["statistics"]
    result = trace_frontier(statistics, config, "trainable_params", base_dir=tmp_path)
    assert [(row.budget, row.score) for row in result.hull] == [(0.0, 0.0)]
    assert result.certified == ()
    assert result.files["frontier_svg"].read_text(encoding="utf-8").rstrip().endswith("</svg>")


def test_other_budgets_hold_at_the_certified_points(settings, saved_statistics, tmp_path):
    settings["optimization"]["max_flops"] = 3e4
    config = RunConfig.model_validate(settings)
    result = trace_frontier(saved_statistics, config, "trainable_params", base_dir=tmp_path, points=4)
    assert result.certified[-1].score < result.hull[-1].score
    assert result.certified[-1].upper_bound < result.hull[-1].score


def test_wrong_resources_and_budgets_are_refused(config, saved_statistics, tmp_path):
    with pytest.raises(ConfigurationError, match="unknown resource 'params'; known: trainable_params, flops"):
        trace_frontier(saved_statistics, config, "params", base_dir=tmp_path)
    with pytest.raises(InfeasibleError, match="max_trainable_params: 1 is too small"):
        trace_frontier(saved_statistics, config, "trainable_params", base_dir=tmp_path, budgets=[1.0])
    assert not Path(tmp_path / "out").exists()


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_an_engine_of_one_rank_has_the_frontier_of_what_it_holds(settings, saved_statistics, tmp_path, engine):
    """At each budget the score is the best of all ranks alone, the hull is above it, and `optimize` says the same."""

    ranks = [1, 2, 4] if engine == "sglang" else [1, 8]

    def config_of(only: int | None, budget: int = 10**6) -> RunConfig:
        rules = [] if only is None else [{"layers": "*", "ranks": [only]}]
        settings["optimization"] = {
            "methods": ["lora"], "lora_ranks": ranks, "max_trainable_params": budget, "serve_with": engine,
            "constraints": {"rules": rules},
            "latency_profile": {"batch_size": 2, "sequence_length": 16},
        }  # fmt: skip
        settings["model"]["task"] = "causal-lm"  # an engine holds no head; nothing but the options is looked at here
        return RunConfig.model_validate(settings)

    def traced(config: RunConfig, **more):
        return trace_frontier(saved_statistics, config, "trainable_params", base_dir=tmp_path, **more)

    found = traced(config_of(None), points=4)
    budgets, scores = [row.budget for row in found.hull], [row.score for row in found.hull]
    assert np.all(np.diff(budgets) > 0)
    slopes = np.diff(scores) / np.diff(budgets)
    assert np.all(np.diff(slopes) <= 1e-9 * slopes[:-1])
    alone = [traced(config_of(rank), points=3) for rank in ranks]
    for row in found.certified:
        single = []
        for rank in ranks:
            try:
                single += traced(config_of(rank), budgets=[row.budget]).certified
            except InfeasibleError:  # less than one layer of this rank
                continue
        best = max(each.score for each in single)
        if engine == "sglang":
            assert row.score == pytest.approx(best, rel=1e-12)
            assert row.upper_bound == max(each.upper_bound for each in single)
        else:
            assert row.score >= best * (1 - 1e-12)  # ranks may be mixed
        assert row.score <= np.interp(row.budget, budgets, scores) * (1 + 1e-9)
    settled = config_of(None, 600)  # utilities depend on the budget of the configuration
    chosen = optimize_statistics(saved_statistics, settled, base_dir=tmp_path / "chosen").manifest
    (row,) = traced(settled, budgets=[600.0]).certified
    assert (row.score, row.gap) == (chosen.score, chosen.gap)
    points = {(row.budget, row.score) for each in alone for row in each.hull}
    if engine == "sglang":  # every point is one of a rank alone, and none of theirs is above
        assert {(row.budget, row.score) for row in found.hull} <= points
        assert all(score <= np.interp(budget, budgets, scores) * (1 + 1e-9) for budget, score in points)
        assert all(row.rank in ranks for row in found.hull[1:])
