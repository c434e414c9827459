"""Budgets beyond everything there is, or below it: the choice, the report, the summary and the frontier are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from layerlens.cli.main import app


@pytest.mark.parametrize("field", ["max_flops", "max_vram_gb", "latency_target_ms"])
def test_a_budget_of_1e308(field: str, settings: dict[str, Any], saved_statistics: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    arguments = ["-c", str(tmp_path / "config.yaml"), "-o", str(tmp_path / "out")]
    one = [*arguments, "--set", f"optimization.{field}=1e308"]
    done = CliRunner().invoke(app, ["optimize", str(saved_statistics), *one])
    assert (done.exit_code, "unexpected" in done.stderr) == (0, False), done.stderr
    assert "the budget lies beyond the figure" in (tmp_path / "out/report.html").read_text(encoding="utf-8")
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "out/manifest.json")])
    assert shown.exit_code == 0, shown.stderr
    small = CliRunner().invoke(
        app, ["optimize", str(saved_statistics), *arguments, "--set", f"optimization.{field}=5e-324"]
    )
    assert small.exit_code == 3
    assert "the smallest that works is" in small.stderr


@pytest.mark.parametrize("resource", ["trainable_params", "vram_gb"])
def test_a_frontier_up_to_1e308(
    resource: str, settings: dict[str, Any], saved_statistics: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    arguments = ["-c", str(tmp_path / "config.yaml"), "-o", str(tmp_path / "out"), "--resource", resource]
    done = CliRunner().invoke(app, ["frontier", str(saved_statistics), *arguments, "--at", "1e30", "--at", "0.01GB"])
    if resource == "vram_gb":
        assert done.exit_code == 0, done.stderr
        assert "<svg" in (tmp_path / "out/frontier.svg").read_text(encoding="utf-8")
    else:
        assert done.exit_code == 2
