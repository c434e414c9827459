"""The sweep, the file of results and the statistics made from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import check_runs as proxy_check
import numpy as np
import pytest
from check_runs import checked_gain
from single_layers import rank_correlation, single_layer_gains, single_layer_records
from study_tables import checked_table, comparison_table, half_table

from layerlens.evaluation import results as analysis
from layerlens.evaluation import training as sweep
from layerlens.evaluation.results import ResultsFile, allocation_key
from layerlens.evaluation.study_report import gain_table, write_gain_plot
from layerlens.evaluation.study_task import StudyTask, lora_layers
from layerlens.exceptions import DataError


def test_a_sweep_extends_its_grid_and_goes_on(task: StudyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(task, learning_rates=(1e-6, 2e-6), steps=4)
    ranks = {lora_layers(task)[0].name: 2}
    results = ResultsFile.open(tmp_path / "tiny.jsonl")
    sweep.run_allocation(small, results, "k", ranks)
    rates = {run["lr"] for run in results.records}
    best = analysis.chosen_rate(results.records)
    # Either the best rate is inside the grid, or the grid was extended as often as is allowed.
    assert min(rates) < best < max(rates) or len(rates) == 2 + sweep.MAX_EXTENSIONS
    assert {run["seed"] for run in results.records if run["lr"] == best} == set(task.seeds)

    again = ResultsFile.open(tmp_path / "tiny.jsonl")
    assert again.records == results.records
    monkeypatch.setattr(sweep, "train", lambda *args, **kwargs: pytest.fail("everything was there"))
    sweep.run_allocation(small, again, "k", ranks)


def test_a_cut_off_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"kind": "run"}\n{"kind": "ru', encoding="utf-8")
    results = ResultsFile.open(path)
    results.append([{"kind": "arm"}])
    assert [record["kind"] for record in ResultsFile.open(path).records] == ["run", "arm"]


def test_a_damaged_line_is_refused_by_number(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"kind": "run"}\n{"kind"\n{"kind": "run"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"results\.jsonl:2: not a JSON object"):
        ResultsFile.open(path)


def test_the_rate_is_chosen_by_validation_on_the_sweep_seeds() -> None:
    runs = [
        {"lr": 0.1, "seed": 0, "validation_loss": 1.0},
        {"lr": 0.1, "seed": 1, "validation_loss": float("nan")},
        {"lr": 0.2, "seed": 0, "validation_loss": 2.0},
        {"lr": 0.2, "seed": 1, "validation_loss": 2.0},
        {"lr": 0.3, "seed": 4, "validation_loss": 0.0},
    ]
    assert analysis.chosen_rate(runs, (0, 1)) == 0.2


def _fake_results(folder: Path, task: str, losses: dict[str, float], noise: float) -> ResultsFile:
    """Three arms whose losses differ by constants and share their seeds' noise, plus a little of their own."""
    results = ResultsFile.open(folder / f"{task}.jsonl")
    results.append([{"kind": "reference", "name": "frozen", "test_loss": 2.0, "validation_loss": 2.0}])
    generator = np.random.default_rng(len(task))
    shared = generator.normal(size=5)
    for arm, loss in losses.items():
        key = allocation_key({arm: 1})
        results.append([{"kind": "arm", "arm": arm, "budget": "tight", "key": key, "params": 10, "ranks": {arm: 1}}])
        own = generator.normal(size=5)
        results.append(
            {"kind": "run", "key": key, "lr": 0.1, "seed": seed, "validation_loss": loss,
             "test_loss": loss + shared[seed] + noise * own[seed], "test_metric": 0.5}
            for seed in range(5)
        )  # fmt: skip
    return results


def test_paired_gains_see_through_the_noise_that_seeds_share(tmp_path: Path) -> None:
    losses = {"uniform": 1.0, "signal": 0.9, "fisher": 1.2}
    files = {name: _fake_results(tmp_path, name, losses, 1e-3) for name in ("one", "three")}
    tables = {name: analysis.arm_results(results, "tight") for name, results in files.items()}
    gains = {
        name: analysis.normalised_gain(found["signal"], found["uniform"], analysis.baseline_loss(files[name]))
        for name, found in tables.items()
    }
    low, high = analysis.bootstrap_interval(gains)
    assert 0.0 < low < high
    mean = np.mean([0.1 / (2.0 - tables[name]["uniform"].test_loss.mean()) for name in files])
    assert low < mean < high or mean == pytest.approx((low + high) / 2, rel=0.1)
    table = gain_table(files, "tight", "tight", ["one", "three"])
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert rows == ["signal", "uniform", "fisher"]
    assert "| 2 / 0 |" in table.splitlines()[2]
    assert "| 0 / 2 |" in table.splitlines()[4]
    assert "2 / 0" in comparison_table(files, "tight", "signal", ["uniform", "fisher"])
    assert "signal at tight against uniform at tight" in half_table(files, [("tight", "tight")], ["signal"])
    gain, taken = checked_gain(files["one"], "tight", ["fisher", "signal"], 1.0)
    assert taken == {"fisher": 0, "signal": 5, "uniform": 0}
    assert np.array_equal(gain, gains["one"])
    gain, taken = checked_gain(files["one"], "tight", ["fisher"], 1.0)
    assert taken == {"fisher": 0, "uniform": 5}
    assert not gain.any()
    assert checked_gain(files["one"], "tight", ["signal"], 0.5) is None  # nobody ran it
    table = checked_table(files, ["tight"], ["signal"], [0.5, 1.0])
    assert "| tight | one |" in table
    assert "; 5 + 0 |" in table
    write_gain_plot(files, "tight", tmp_path / "gain.svg", ["one", "three"], {})
    assert (tmp_path / "gain.svg").read_text(encoding="utf-8").rstrip().endswith("</svg>")


def test_a_check_is_run_once_for_every_seed(task: StudyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = ResultsFile.open(tmp_path / "tiny.jsonl")
    results.append(
        {"kind": "run", "key": "k", "lr": rate, "seed": seed, "validation_loss": rate}
        for rate in (0.01, 0.02)
        for seed in task.sweep_seeds
    )
    proxy_check.run_check(task, results, "k", {lora_layers(task)[0].name: 2}, 0.5)
    found = results.select(kind="check", share=0.5, lr=0.01, steps=3)
    assert [record["seed"] for record in found] == list(task.seeds)
    assert all(np.isfinite(record["validation_loss"]) for record in found)
    monkeypatch.setattr(proxy_check, "train", lambda *args, **kwargs: pytest.fail("everything was there"))
    proxy_check.run_check(task, results, "k", {lora_layers(task)[0].name: 2}, 0.5)


def test_single_layers_are_measured_against_the_head_alone(task: StudyTask) -> None:
    names = [layer.name for layer in lora_layers(task)][:3]
    records = single_layer_records(task, names, steps=4, seed=0, rates=(1e-12, 2e-12))
    assert set(single_layer_gains(records)) == set(names)
    # With a rate of nearly nothing an adapted layer changes the loss by no more than rounding.
    assert all(abs(record["gain"]) < 1e-5 for record in records)


def test_rank_correlation_and_its_interval() -> None:
    first = {str(index): float(index) for index in range(30)}
    second = {name: value + (3.0 if int(name) % 2 else 0.0) for name, value in first.items()}
    found, low, high = rank_correlation(first, second)
    assert 0.9 < low <= found <= high <= 1.0
    assert np.isnan(rank_correlation(first, dict.fromkeys(first, 1.0))[0])
