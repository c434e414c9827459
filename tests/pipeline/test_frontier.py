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
    assert [row["kind"] for row in rows] == ["hull"] * len(result.hull) + ["certified"] * 3
    assert [float(row["budget"]) for row in rows] == [row.budget for row in (*result.hull, *result.certified)]
    assert all(row["method"] for row in rows[1 : len(result.hull)])
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
