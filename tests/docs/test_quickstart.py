"""The README's first command: what scripts/quickstart.sh runs after installing, on the real model and data.

With an eighth of its samples, at half their length and on one thread, for the time that it takes;
scripts/check_wheel.sh runs it as it is.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from layerlens.cli.main import app

ROOT = Path(__file__).parents[2]
SMALLER = (
    "data.calibration_samples=32", "data.max_length=48", "model.head_fit_samples=64", "runtime.threads=1",
    "optimization.latency_profile.sequence_length=48",
)  # fmt: skip
FEWER = tuple(word for setting in SMALLER for word in ("--set", setting))


def quickstart_command() -> list[str]:
    """The last line of scripts/quickstart.sh."""
    line = (ROOT / "scripts/quickstart.sh").read_text(encoding="utf-8").splitlines()[-1]
    assert line.startswith("exec .venv/bin/layerlens ")
    assert line.endswith(' "$@"')
    return shlex.split(line)[2:-1]


def run(*arguments: str, cache: Path) -> str:
    # The installed program: `python -m layerlens` would take the checkout's folder, which has no compiled modules.
    program = str(Path(sys.executable).with_name("layerlens"))
    environment = {"LAYERLENS_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(cache)}
    done = subprocess.run([program, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def run_here(*arguments: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LAYERLENS_CACHE", str(cache))
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.stderr
    return done.stderr


def test_quickstart_runs_and_the_second_run_gives_the_same_bytes_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The second run is in this process, which has imported everything already."""
    cache = tmp_path / "cache"
    first = run(*quickstart_command(), *FEWER, "-o", str(tmp_path / "first"), cache=cache)
    again = run_here(*quickstart_command(), *FEWER, "-o", str(tmp_path / "again"), cache=cache, monkeypatch=monkeypatch)
    assert "statistics from the cache" not in first
    assert "statistics from the cache" in again
    assert not re.search(r"USDT|profiler|^\[W|it/s|FutureWarning", first, re.MULTILINE)  # noise of libraries
    assert "exactly 0" in first  # largest change of a logit at step 0
    texts = [(tmp_path / name / "manifest.json").read_text(encoding="utf-8") for name in ("first", "again")]
    assert len({re.sub(r'"created_at": "[^"]*"', "", text) for text in texts}) == 1
    manifest = json.loads(texts[0])
    assert manifest["status"] == "optimal"
    limited = {use["resource"]: use for use in manifest["resources"] if use["budget"] is not None}
    assert set(limited) == {"trainable_params", "flops", "vram_gb"}
    assert all(use["total"] <= use["budget"] for use in limited.values())
    assert "above the budget" not in first  # what is measured keeps the budgets too
    for name in ("manifest.yaml", "report.html", "statistics.safetensors", "peft/adapter_model.safetensors"):
        assert (tmp_path / "first" / name).stat().st_size > 0


def test_test_script_ends_in_the_test_suite():
    last = (ROOT / "scripts/test.sh").read_text(encoding="utf-8").splitlines()[-1]
    assert last == 'exec .venv/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"'
    assert "scripts/test.sh" in (ROOT / ".ci/run").read_text(encoding="utf-8")
