"""Nothing of another version of the user's code is taken: out of the cache, from checkpoints or a sweep's results."""

from __future__ import annotations

import importlib
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from layerlens.config import RunConfig
from layerlens.jobs.sweep import open_sweep, write_tasks
from layerlens.jobs.sweep_run import FINISHED, run_task
from layerlens.pipeline import run_config

PROJECT = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        def forward(self, x):
            return self.out(torch.relu(self.inner(x)))

    def build():
        torch.manual_seed(0)
        return Net()

    def dataset():
        drawn = torch.Generator().manual_seed(1)
        x, y = torch.randn(32, 6, generator=drawn), torch.randint(0, 3, (32,), generator=drawn)
        return torch.utils.data.TensorDataset(x, y)

    HANDLE = None

    def loss(output, y):
        return nn.functional.cross_entropy(output, y, reduction="none")
"""
SETTINGS: dict[str, Any] = {
    "model": {"factory": "changed_project:build", "task": "custom", "loss": "changed_project:loss"},
    "data": {"source": "changed_project:dataset", "calibration_samples": 8, "batch_size": 4},
    "profiling": {"statistics": ["fisher"]},
    "optimization": {"max_trainable_params": 100, "methods": ["lora"], "latency_profile": {"batch_size": 2}},
    "runtime": {"threads": 1, "cache_dir": "cache"},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    write(tmp_path)
    yield tmp_path
    sys.modules.pop("changed_project", None)


def write(folder: Path, before: str = "", after: str = "") -> None:
    """The user's file, edited, as another process would import it."""
    assert before in PROJECT
    (folder / "changed_project.py").write_text(textwrap.dedent(PROJECT.replace(before, after) if before else PROJECT))
    sys.modules.pop("changed_project", None)
    importlib.invalidate_caches()


def run(folder: Path, **model: Any) -> Any:
    settings = SETTINGS | {"model": SETTINGS["model"] | model}
    return run_config(RunConfig.model_validate(settings), base_dir=folder)


def test_statistics_of_other_code_are_not_taken(folder: Path):
    assert not run(folder).statistics_from_cache
    write(folder, "def build", "# a comment\n    def build")
    assert run(folder).statistics_from_cache
    edits = {
        'return nn.functional.cross_entropy(output, y, reduction="none")':
            'return 10 * nn.functional.cross_entropy(output, y, reduction="none")',
        "torch.relu(self.inner(x))": "torch.tanh(self.inner(x))",
        "(output, y,": "(output * 2, y,",
    }  # fmt: skip
    for before, after in edits.items():
        write(folder, before, after)
        assert not run(folder).statistics_from_cache, after
    write(folder)
    assert run(folder).statistics_from_cache


def test_code_that_cannot_be_read_is_measured_anew_and_said(folder: Path):
    write(folder, "HANDLE = None", "HANDLE = (n for n in range(3))")
    text = (folder / "changed_project.py").read_text()
    (folder / "changed_project.py").write_text(text.replace("(output, y, red", "(output, y + 0 * bool(HANDLE), red"))
    for _ in range(2):
        result = run(folder)
        assert not result.statistics_from_cache
        assert any("cache: not used" in line and "HANDLE" in line for line in result.warnings)
    assert not list((folder / "cache" / "blobs").iterdir())


def test_another_configuration_of_the_same_weights_is_measured_anew(
    settings: dict[str, Any], tiny_bert_dir: Path, tmp_path: Path
):
    import shutil

    settings["optimization"] = SETTINGS["optimization"] | {"latency_profile": {"batch_size": 2, "sequence_length": 16}}
    for name in ("one", "two"):
        shutil.copytree(tiny_bert_dir, tmp_path / name)
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    results = []
    for name, activation in (("one", "gelu"), ("two", "gelu"), ("two", "relu")):
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"hidden_act": activation}))
        settings["model"]["name_or_path"] = str(tmp_path / name)
        results.append(run_config(RunConfig.model_validate(settings), base_dir=tmp_path).statistics_from_cache)
    assert results == [False, True, False]


def test_a_sweep_runs_a_finished_task_of_other_code_again(folder: Path):
    (folder / "base.yaml").write_text(json.dumps(SETTINGS))
    (folder / "sweep.yaml").write_text(json.dumps({"base": "base.yaml", "directory": "swept", "grid": {
        "optimization.max_trainable_params": [100]}}))  # fmt: skip
    sweep = open_sweep(folder / "sweep.yaml")
    tasks = write_tasks(sweep)
    assert run_task(sweep, tasks, 0) != FINISHED
    assert run_task(sweep, tasks, 0) == FINISHED
    write(folder, "torch.relu(self.inner(x))", "torch.tanh(self.inner(x))")
    assert run_task(sweep, tasks, 0) != FINISHED
