"""The house stays clean: imports go downward only, the code is typed, formatted and free of lint."""

from __future__ import annotations

import shutil
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


def test_check_script_fails_when_one_checker_does(tmp_path: Path):
    """On a checkout whose tools only say their name, of which mypy finds something."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    shutil.copy(ROOT / "scripts/check.sh", tmp_path / "scripts")
    (tmp_path / "scripts/install.sh").write_text("install_layerlens() { echo install $1; }\n")
    for tool in ("ruff", "mypy", "lint-imports"):
        script = tmp_path / ".venv/bin" / tool
        script.write_text(f"#!/bin/sh\necho {tool} $*\n" + "exit 1\n" * (tool == "mypy"))
        script.chmod(0o755)
    done = subprocess.run([tmp_path / "scripts/check.sh"], capture_output=True, text=True, check=False)
    ran = ["install test", "ruff check .", "ruff format --check .", "mypy", "lint-imports"]
    assert done.stdout.split("\n") == [*ran, ""]
    assert (done.returncode, done.stderr) == (1, "failed: mypy\n")


def test_nothing_in_the_build_pulls_torch():
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    (requires,) = [line for line in lines if line.startswith("requires = ")]
    assert "torch" not in requires


def test_every_module_says_what_it_holds():
    for path in sorted((ROOT / "layerlens").rglob("*.py")):
        assert path.read_text(encoding="utf-8").lstrip().startswith('"""'), f"{path.relative_to(ROOT)} has no docstring"
