"""The profiling benchmark with ``--times-only`` needs no earlier file, and keeps the memory of one that is there."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SECONDS = {"ordinary step": [1.0, 2.0, 4.0], "Fisher": [0.5, 1.0, 3.0]}


@pytest.fixture
def profiling(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark; its children answer with ``SECONDS`` and refuse to measure memory."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    module = importlib.import_module("profiling_benchmark")

    def in_child(arguments: list[str], threads: int) -> dict[str, list[float]]:
        assert "--row" not in arguments, "memory was measured"
        return SECONDS

    monkeypatch.setattr(module, "in_child", in_child)
    return module


def times_only(profiling: ModuleType, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    options = ["--times-only", "--models", "minilm", "--dtypes", "float32", "--threads", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["profiling_benchmark.py", *options])
    profiling.main()
    results: list[dict[str, object]] = json.loads(out.read_text())["results"]
    return results


def test_a_new_file_has_times_and_no_memory(
    profiling: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new" / "times.json"
    fisher = times_only(profiling, out, monkeypatch)[1]
    assert (fisher["row"], fisher["ratio"]) == ("Fisher", 0.5)  # the median of the rounds' ratios 0.5, 0.5 and 0.75
    assert "peak_mb" not in fisher
    assert "| Fisher | 0.50 (0.50-0.75) |" in out.with_suffix(".md").read_text()


def test_the_memory_of_an_earlier_file_stays(
    profiling: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "times.json"
    times_only(profiling, out, monkeypatch)
    content = json.loads(out.read_text())
    content["results"][1] |= {"peak_mb": 310, "peak_mb_checkpointed": 54, "ratio": 9.0}
    out.write_text(json.dumps(content))
    fisher = times_only(profiling, out, monkeypatch)[1]
    assert (fisher["peak_mb"], fisher["ratio"]) == (310, 0.5)
    assert "| Fisher, checkpointed | 54 |" in out.with_suffix(".md").read_text()
