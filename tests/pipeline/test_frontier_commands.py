"""``layerlens frontier`` and ``layerlens optimize --budget-sweep`` on real statistics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from layerlens.cli.main import app


@pytest.fixture
def invoke(settings, saved_statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A command on the saved statistics and a configuration with one budget; wide, plain output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return lambda command, *arguments: CliRunner().invoke(
        app, [command, str(saved_statistics), "--config", "config.yaml", *arguments]
    )


def test_frontier_shows_a_row_for_each_budget_and_names_its_files(invoke, tmp_path):
    result = invoke("frontier", "--at", "0.3k", "--at", "900")
    assert result.exit_code == 0, result.stderr
    assert "300" in result.stderr
    assert "out/frontier.csv" in result.stderr
    assert (tmp_path / "out" / "frontier.svg").is_file()


def test_frontier_as_json(invoke):
    result = invoke("frontier", "--json", "--points", "3", "--resource", "flops")
    content = json.loads(result.stdout)
    assert content["resource"] == "flops"
    assert [row["kind"] for row in content["certified"]] == ["certified"] * 3


def test_a_sweep_writes_a_manifest_for_each_budget(invoke, tmp_path):
    result = invoke("optimize", "--budget-sweep", "trainable_params=300,900", "--json")
    assert result.exit_code == 0, result.stderr
    scores = [entry["score"] for entry in json.loads(result.stdout)]
    assert scores == sorted(scores)
    for budget in (300, 900):
        manifest = json.loads((tmp_path / "out" / f"trainable_params-{budget}" / "manifest.json").read_text())
        assert sum(row["cost"] for row in manifest["allocations"]) <= budget
    assert "300" in invoke("optimize", "--budget-sweep", "trainable_params=300").stderr


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("params=1", "--budget-sweep: got 'params=1'; give RESOURCE=B1,B2,..."),
        ("flops", "--budget-sweep: got 'flops'"),
        ("flops=a", "--budget-sweep: must be a number such as 300000, 300k or 1.5M, got 'a'"),
        ("trainable_params=0", "OptimizationConfig.max_trainable_params"),
    ],
)
def test_a_sweep_that_cannot_be_read_is_refused(invoke, tmp_path, sweep, message):
    result = invoke("optimize", "--budget-sweep", sweep)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()
