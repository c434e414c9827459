"""``training.max_train_hours``: hours become a budget of one training step."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from typer.testing import CliRunner

from layerlens.cli.main import app
from layerlens.config import RunConfig
from layerlens.exceptions import ConfigurationError, InfeasibleError
from layerlens.jobs.hours import HOUR_MS, SAMPLES, with_hours
from layerlens.jobs.solve import option_tables
from layerlens.pipeline import optimize_statistics
from layerlens.profiling.statistics_file import load_statistics

BATCH = {"batch_size": 4}


def config_of(settings: dict[str, Any], training: dict[str, Any], **optimization: Any) -> RunConfig:
    budgets = {"max_flops": None, "latency_target_ms": None, "max_vram_gb": None, **optimization}
    return RunConfig.model_validate(
        {**settings, "training": {**BATCH, **training}, "optimization": {**settings["optimization"], **budgets}}
    )


@pytest.fixture
def measured(saved_statistics):
    return load_statistics(saved_statistics)


def step_budget(config: RunConfig, statistics: Any) -> float:
    budget = with_hours(config, statistics).optimization.max_step_ms
    assert budget is not None
    return budget


def test_hours_are_divided_by_the_steps(settings, measured):
    """By hand: a step of 4 samples counts twice one of the latency profile's 2."""
    _, statistics = measured
    samples = statistics.provenance[SAMPLES]
    batches = -(-samples // 4)
    for training, steps in (
        ({"epochs": 3}, 3 * batches),
        ({"max_steps": 50}, 50),
        ({"max_steps": 50, "gradient_accumulation": 2}, 100),
        ({"epochs": 3, "train_samples": 8}, 3 * 2),
    ):
        config = config_of(settings, {"max_train_hours": 0.5, **training})
        assert step_budget(config, statistics) == pytest.approx(0.5 * HOUR_MS / (2 * steps)), training


def test_the_smaller_of_the_two_budgets_counts(settings, measured):
    _, statistics = measured
    training = {"max_train_hours": 1.0, "max_steps": 1000}
    assert step_budget(config_of(settings, training, max_step_ms=7.0), statistics) == 7.0
    assert step_budget(config_of(settings, training, max_step_ms=1e9), statistics) == pytest.approx(HOUR_MS / 2000)
    without = config_of(settings, {"max_steps": 1000})
    assert with_hours(without, statistics) is without


def test_statistics_that_do_not_say_how_many_samples_there_are_need_max_steps(settings, measured):
    _, statistics = measured
    old = {name: value for name, value in statistics.provenance.items() if name != SAMPLES}
    statistics = type(statistics)(**{**vars(statistics), "provenance": old})
    with pytest.raises(ConfigurationError, match=r"max_train_hours: .* training\.max_steps"):
        with_hours(config_of(settings, {"max_train_hours": 1.0}), statistics)
    assert step_budget(config_of(settings, {"max_train_hours": 1.0, "max_steps": 10}), statistics) > 0.0


def hours_for(config: RunConfig, measured: Any, step_ms: float) -> float:
    """Hours of ``max_steps`` steps of the latency profile's batch."""
    return step_ms * 2 * config.training.max_steps / HOUR_MS


def test_a_choice_keeps_the_hours_and_too_few_are_refused_with_the_smallest_that_would_do(
    settings, measured, saved_statistics, tmp_path
):
    spec, statistics = measured
    config = config_of(settings, {"max_steps": 500})
    _, costs = option_tables(spec, statistics, config)
    most = costs.base["step_ms"] + float(costs.depth.cost__sr[0, 4])
    middle = 0.5 * (costs.base["step_ms"] + most)
    hours = hours_for(config, measured, middle)
    within = config_of(settings, {"max_steps": 500, "max_train_hours": hours})
    result = optimize_statistics(saved_statistics, within, base_dir=tmp_path)
    use = {one.resource: one for one in result.manifest.resources}["step_ms"]
    assert use.budget == pytest.approx(middle)
    assert use.base < use.total <= use.budget
    free = optimize_statistics(saved_statistics, config, base_dir=tmp_path)
    assert {one.resource: one for one in free.manifest.resources}["step_ms"].total > use.budget

    too_few = config_of(settings, {"max_steps": 500, "max_train_hours": 0.5 * hours_for(config, measured, use.base)})
    with pytest.raises(InfeasibleError, match=r"max_train_hours") as refused:
        optimize_statistics(saved_statistics, too_few, base_dir=tmp_path)
    # The smallest that would do does, and a little less does not.
    hours = float(re.search(r"at least (\S+) h are needed", str(refused.value)).group(1))
    for share, fits in ((1.0, True), (0.9999, False)):
        again = config_of(settings, {"max_steps": 500, "max_train_hours": share * hours})
        if fits:
            optimize_statistics(saved_statistics, again, base_dir=tmp_path)
        else:
            with pytest.raises(InfeasibleError, match=r"max_train_hours"):
                optimize_statistics(saved_statistics, again, base_dir=tmp_path)
    # Where the user's own budget of a step is the smaller one, the message is about that.
    own = config_of(settings, {"max_steps": 500, "max_train_hours": 9.0}, max_step_ms=0.5 * use.base)
    with pytest.raises(InfeasibleError, match=r"^optimization\.max_step_ms"):
        optimize_statistics(saved_statistics, own, base_dir=tmp_path)


def test_the_command_refuses_with_exit_code_3(settings, saved_statistics, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({**settings, "training": {**BATCH, "max_steps": 500, "max_train_hours": 1e-9}}))
    command = ["optimize", str(saved_statistics), "-c", str(path), "-o", str(tmp_path / "none")]
    done = CliRunner().invoke(app, command)
    assert (done.exit_code, "max_train_hours" in done.stderr) == (3, True)
    assert not (tmp_path / "none").exists()
