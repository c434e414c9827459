"""The house stays clean: imports go downward only; code is typed, formatted and free of lint; scripts are listed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import clang_format
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


def test_cpp_has_one_style():
    tool = clang_format.get_executable("clang-format")
    files = sorted(path for path in (ROOT / "cpp").rglob("*") if path.suffix in (".cpp", ".hpp"))
    assert len(files) > 30
    done = subprocess.run(
        [tool, "--dry-run", "--Werror", *files], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_script_is_reached_from_a_described_recipe():
    """The justfile is the door to scripts/: a script is run by a recipe, or by one that is, or by a tool's settings."""
    text = (ROOT / "justfile").read_text(encoding="utf-8")
    for paragraph in text.split("\n\n")[2:]:
        described, recipe, *commands = paragraph.strip().splitlines()
        assert re.fullmatch(r"# [^A-Z].*[^.]", described), f"{recipe}: no description"
        assert len(commands) == 1, f"{recipe}: more than one line"
    scripts = {path.name: path for path in (ROOT / "scripts").rglob("*") if path.suffix in (".sh", ".py", ".txt")}
    reached: set[str] = set()
    read = [text, *((ROOT / name).read_text(encoding="utf-8") for name in ("mkdocs.yml", "pyproject.toml"))]
    while read:
        text = read.pop()
        new = {name for name in scripts if f"/{name}" in text} - reached
        reached |= new
        read += [scripts[name].read_text(encoding="utf-8") for name in new]
    assert reached == scripts.keys()


def test_demos_stay_out_of_the_wheel():
    """Toy models and drawn plates are nobody's default: nothing in the package knows them."""
    assert 'wheel.packages = ["layerlens"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for path in (ROOT / "layerlens").rglob("*.py"):
        assert not re.search(r"\btoys\b|builtin:plates", path.read_text(encoding="utf-8")), path
