"""Running the command line inside the test's process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from layerlens.cli.main import app

# pytest's importlib mode does not let test files import their neighbours.
sys.path.insert(0, str(Path(__file__).parent))

from cli_support import VALID, FakePipeline, Invoke


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """``invoke("run", "config.yaml")`` in an empty directory that has a valid config.yaml; wide, plain output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LAYERLENS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "config.yaml").write_text(VALID, encoding="utf-8")
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    fake = FakePipeline()
    monkeypatch.setitem(sys.modules, "layerlens.pipeline", fake)
    return fake
