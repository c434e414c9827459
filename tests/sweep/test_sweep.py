"""A grid of runs as independent tasks: listed, run once each, taken up again, and collected into one table."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from layerlens.cli.main import app
from layerlens.exceptions import ConfigurationError, SweepError
from layerlens.jobs.sweep import open_sweep, read_tasks, write_tasks
from layerlens.jobs.sweep_run import DONE, FINISHED, run_task
from layerlens.profiling.cache import SensitivityCache

SWEEP = {
    "base": "base/config.yaml",
    "directory": "grid",
    "seeds": [0, 1],
    "budgets": [{"max_trainable_params": 700}, {"max_trainable_params": 1500, "max_vram_gb": 0.1}],
}


@pytest.fixture
def folder(tmp_path: Path, tiny_bert_dir: Path, reviews_jsonl: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with sweep.yaml, its base in another one, and the model and data beside the base."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/model").symlink_to(tiny_bert_dir)
    (tmp_path / "base/reviews.jsonl").symlink_to(reviews_jsonl)
    base = {
        "model": {"name_or_path": "./model", "head_fit_samples": 32},
        "data": {"source": "reviews.jsonl", "calibration_samples": 24, "max_length": 16, "batch_size": 8},
        "optimization": {"max_trainable_params": 1, "lora_ranks": [1, 2, 4], "check_predictions": False},
        "runtime": {"threads": 1},
    }
    base["optimization"]["latency_profile"] = {"batch_size": 2, "sequence_length": 16}  # type: ignore[index]
    (tmp_path / "base/config.yaml").write_text(json.dumps(base), encoding="utf-8")
    write(tmp_path, SWEEP)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, sweep: dict[str, Any]) -> None:
    (folder / "sweep.yaml").write_text(json.dumps(sweep), encoding="utf-8")


def cli(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["sweep", "sweep.yaml", *arguments])


def test_the_list_has_a_row_a_file_and_a_command_for_every_task(folder):
    tasks = write_tasks(open_sweep(Path("sweep.yaml")))
    rows = [json.loads(line) for line in (folder / "grid/tasks.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == [0, 1, 2, 3]
    assert rows[1]["settings"] == {
        "runtime.seed": 0, "optimization.max_trainable_params": 1500, "optimization.max_vram_gb": 0.1
    }  # fmt: skip
    assert rows[3]["command"] == "layerlens sweep sweep.yaml --task 3"
    assert all((folder / row["config"]).is_file() for row in rows)
    assert len({task.name for task in tasks}) == 4
    # Tasks that differ in budgets alone share what is measured.
    assert tasks[0].measures == tasks[1].measures != tasks[2].measures == tasks[3].measures
    before = {path: path.stat().st_mtime_ns for path in (folder / "grid").rglob("*")}
    assert write_tasks(open_sweep(Path("sweep.yaml"))) == tasks == read_tasks(open_sweep(Path("sweep.yaml")))
    assert {path: path.stat().st_mtime_ns for path in (folder / "grid").rglob("*")} == before


def test_finished_tasks_are_skipped_and_everything_else_is_run_again(folder):
    sweep = open_sweep(Path("sweep.yaml"))
    tasks = write_tasks(sweep)
    assert [run_task(sweep, tasks, number) for number in (0, 1)] == [DONE, DONE]
    cache = SensitivityCache(folder / "grid/cache")
    assert len(cache.entries()) == 1  # measured once
    assert run_task(sweep, tasks, 0) == FINISHED
    manifest = folder / tasks[0].directory / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole[:-100])  # cut short
    assert run_task(sweep, tasks, 0) == DONE
    config = folder / tasks[0].config
    config.write_text(config.read_text().replace("max_trainable_params: 700", "max_trainable_params: 800"))
    assert run_task(sweep, tasks, 0) == DONE  # the manifest that is there is of another configuration
    assert run_task(sweep, tasks, 0) == FINISHED
    with pytest.raises(SweepError, match="--task 4: the list has the tasks 0 to 3"):
        run_task(sweep, tasks, 4)


def test_tasks_that_measure_the_same_at_the_same_time_measure_it_once(folder, monkeypatch):
    sweep = open_sweep(Path("sweep.yaml"))
    tasks = write_tasks(sweep)
    from layerlens.profiling import measure

    measured: list[int] = []
    real = measure.measure_share

    def counted(*arguments: Any, **keywords: Any) -> Any:
        measured.append(1)
        return real(*arguments, **keywords)

    monkeypatch.setattr("layerlens.jobs.measure.measure_share", counted)
    outcomes: list[str] = []
    told: list[str] = []
    threads = [
        threading.Thread(target=lambda n=number: outcomes.append(run_task(sweep, tasks, n, warn=told.append)))
        for number in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (outcomes, len(measured)) == ([DONE, DONE], 1)
    assert "waiting for another task of the sweep that measures the same" in told


def test_run_here_goes_on_after_a_failure_and_the_table_has_what_is_finished(folder, monkeypatch, warm_python):
    monkeypatch.setattr(sys, "executable", str(warm_python.program("python")))  # which it starts for every task
    write(folder, {**SWEEP, "seeds": [], "budgets": [{"max_trainable_params": 700}, {"max_vram_gb": 1e-9}]})
    assert cli("--task", "0").exit_code == 2  # there is no list yet
    done = cli("--run", "--jobs", "2")
    assert done.exit_code == 1, done.output
    assert "1 done, 0 finished before, 1 failed" in done.output
    assert "1 of 2 tasks failed; their output is in grid/logs" in done.output
    assert "optimization.max_vram_gb" in done.output or "vram" in done.output
    collected = cli("--collect", "--json")
    rows = json.loads(collected.stdout)
    assert [row["status"] for row in rows] == ["optimal", "missing"]
    assert rows[0]["trainable_params"] <= 700
    assert 0.0 <= rows[0]["gap"] <= 1e-6
    assert rows == json.loads((folder / "grid/table.json").read_text())
    with (folder / "grid/table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert float(table[0]["score"]) == rows[0]["score"]
    assert (table[1]["score"], table[1]["optimization.max_vram_gb"]) == ("", "1e-09")
    shown = cli("--collect").output
    assert "missing" in shown
    assert "1 of 2 tasks are not finished" in shown


def test_a_slurm_array_task_runs_its_own(folder, monkeypatch, warm_python):
    script = Path(__file__).parents[2] / "demos/schedulers/slurm_array.sh"
    assert cli("--quiet").exit_code == 0
    environment = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_CPUS_PER_TASK": "1"}
    # What is installed in the environment that it is run in: layerlens.
    environment["PATH"] = (
        f"{warm_python.program('layerlens', '-m', 'layerlens').parent}{os.pathsep}{os.environ['PATH']}"
    )
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run(["bash", script, "sweep.yaml"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(cli("--collect", "--json").stdout)
    assert [row["status"] for row in rows] == ["missing", "missing", "optimal", "missing"]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"seeds": []}, "sweep.yaml:1:1: nothing is varied; give models, budgets, seeds or grid"),
        ({"seds": [1]}, "seds: unknown key; known: base, directory, models, budgets, seeds, grid"),
        ({"seeds": ["x"]}, "seeds.0: Input should be a valid integer"),
        ({"grid": {"seed": [1]}}, "'seed': must be a section and a key, such as data.calibration_samples"),
        ({"grid": {"output.directory": ["x"]}}, "every task has an output directory of its own"),
        ({"seeds": [1, 1]}, "runtime.seed: 1 appears twice; give each value once"),
        ({"budgets": [{"max_params": 1}]}, "with optimization.max_params: 1: "),
        ({"seeds": [0], "base": "none.yaml"}, "no configuration file at "),
        ({"seeds": list(range(400)), "grid": {"data.batch_size": list(range(1, 400))}}, "the grid has 159,600 tasks"),
    ],
)
def test_what_is_wrong_in_a_sweep_is_said(folder, sweep, message):
    write(folder, {"base": "base/config.yaml", **sweep})
    with pytest.raises(ConfigurationError) as refused:
        write_tasks(open_sweep(Path("sweep.yaml")))
    assert message in str(refused.value)
    assert not (folder / "sweep").exists()


def test_options_that_do_not_go_together(folder):
    assert "give one of them" in cli("--run", "--collect").output
    assert "--jobs: belongs to --run" in cli("--jobs", "2").output
    assert cli("--run", "--jobs", "1000").exit_code == 2
