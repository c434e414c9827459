"""The house stays clean: imports go downward only, the code is typed, formatted and free of lint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["-c", "from importlinter.cli import lint_imports_command as main; main()"], id="import-linter"),
        pytest.param(["-m", "ruff", "check", "."], id="ruff-check"),
        pytest.param(["-m", "ruff", "format", "--check", "."], id="ruff-format"),
        pytest.param(["-m", "mypy"], id="mypy"),
    ],
)
def test_checker_finds_nothing(command: list[str]):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_in_the_build_pulls_torch():
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    (requires,) = [line for line in lines if line.startswith("requires = ")]
    assert "torch" not in requires


def test_every_module_says_what_it_holds():
    for path in sorted((ROOT / "layerlens").rglob("*.py")):
        assert path.read_text(encoding="utf-8").lstrip().startswith('"""'), f"{path.relative_to(ROOT)} has no docstring"
