"""The origin's interface runs unchanged."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from layerlens.config import OptimizationConfig, ProfilingConfig
from layerlens.exceptions import ActivationCacheError
from layerlens.manifest import read_manifest
from layerlens.models import LayerSpec, ModelSpec
from layerlens.pipeline import run_pipeline

ROOT = Path(__file__).parents[2]


def test_the_origins_quickstart_runs_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "demos" / "origin_quickstart.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1] == "origin interface: ok"


def spec(names: str) -> ModelSpec:
    return ModelSpec("m", 1_000_000, [LayerSpec(name=name, hidden_size=64) for name in names])


def allocate(cache: dict[str, dict[str, float]], tmp_path: Path, **budgets: float) -> list[dict[str, object]]:
    path = run_pipeline(
        spec("".join(cache)),
        ProfilingConfig(metric_weights={"gradient_energy": 1.0, "fisher": 1.0}),
        OptimizationConfig(**{"max_trainable_params": 2000, **budgets}),
        cache,
        tmp_path / "out",
    )
    return json.loads(path.read_text(encoding="utf-8"))["allocations"]


def test_more_sensitive_layers_never_get_less(tmp_path: Path):
    cache = {
        name: {"grad_norm": 0.1 + value, "fisher_trace": value} for name, value in zip("abcde", range(5), strict=True)
    }
    rows = allocate(cache, tmp_path)
    utilities = [row["utility"] for row in rows]
    assert utilities == sorted(utilities)
    assert sum(row["cost"] for row in rows) <= 2000


def test_a_bad_cache_is_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(ActivationCacheError, match="b"):
        allocate({"a": {"grad_norm": 1.0, "fisher_trace": 1.0}, "b": {"grad_norm": float("nan")}}, tmp_path)
    assert not (tmp_path / "out").exists()


def test_nothing_of_an_earlier_choice_stays_beside_the_new_one(tmp_path: Path):
    (tmp_path / "out/peft").mkdir(parents=True)
    for name in ("peft/adapter_config.json", "report.html", "layerlens_modules.safetensors", "notes.txt"):
        (tmp_path / "out" / name).write_text("old", encoding="utf-8")
    allocate({"a": {"grad_norm": 1.0, "fisher_trace": 1.0}}, tmp_path)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "manifest.yaml", "notes.txt"]


def test_the_manifest_reads_back(tmp_path: Path):
    allocate({"a": {"grad_norm": 1.0, "fisher_trace": 1.0}}, tmp_path)
    manifest = read_manifest(tmp_path / "out/manifest.json")
    assert (manifest.model.task, manifest.model.num_labels, manifest.model.labels) == ("", 0, ())
