"""Which way a model is held while it is profiled, and that a whole run does not depend on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from layerlens.config import RunConfig
from layerlens.exceptions import ConfigurationError, ModelSpecError
from layerlens.jobs.memory_mode import choose_mode
from layerlens.pipeline import run_config
from layerlens.profiling.statistics_file import load_statistics

MODES = ("plain", "checkpointed", "streamed")


def job(model: Path, data: Path, output: Path, **profiling: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"name_or_path": str(model), "head_fit_samples": 20},
            "data": {"source": str(data), "calibration_samples": 20, "max_length": 16, "batch_size": 8},
            "profiling": profiling,
            "optimization": {"max_trainable_params": 2000, "latency_profile": {"sequence_length": 16}},
            "output": {"directory": str(output)},
            "runtime": {"threads": 1, "cache_dir": str(output.parent / "cache")},
        }
    )


def test_a_run_has_the_same_statistics_in_every_mode(tmp_path: Path, tiny_bert_dir: Path, reviews_jsonl: Path):
    found, choices = {}, {}
    for mode in MODES:
        config = job(tiny_bert_dir, reviews_jsonl, tmp_path / mode / "out", memory_mode=mode)
        result = run_config(config, base_dir=tmp_path)
        found[mode] = result.files["statistics"].read_bytes()
        choices[mode] = [(row.layer, row.method, row.rank) for row in result.manifest.allocations]
        assert result.manifest.provenance.memory_mode == mode
        assert (result.files["peft"] / "adapter_model.safetensors").is_file()
        assert bool(result.measured) == (mode != "streamed")
    # The new head is fitted, the gradients taken, and the footprint counted alike: the same bits, so the same key.
    assert found["plain"] == found["streamed"]
    assert choices["plain"] == choices["streamed"]
    # Checkpointed layers have the same statistics too; what BERT keeps is counted otherwise, so the key is another.
    plain, checkpointed = (load_statistics(tmp_path / mode / "out" / "statistics.safetensors")[1] for mode in MODES[:2])
    layers = [(x.layer, method, one.energy, one.trace) for x in plain.layers for method, one in x.by_method.items()]
    assert layers == [
        (x.layer, method, one.energy, one.trace) for x in checkpointed.layers for method, one in x.by_method.items()
    ]
    assert plain.provenance["identity"] != checkpointed.provenance["identity"]
    again = job(tiny_bert_dir, reviews_jsonl, tmp_path / "plain" / "again", memory_mode="streamed")
    assert run_config(again, base_dir=tmp_path).statistics_from_cache
    assert not list((tmp_path / "streamed" / "cache" / "streams").iterdir())


def test_auto_takes_the_first_mode_that_is_predicted_to_fit(tmp_path: Path):
    predicted = {"plain": 9.0, "checkpointed": 7.0, "streamed": 2.0}
    for limit, mode in ((10.0, "plain"), (8.0, "checkpointed"), (3.0, "streamed")):
        config = job(tmp_path, tmp_path, tmp_path, max_memory_gb=limit)
        plan = choose_mode(config, predicted, {})
        assert plan.mode == mode
        assert f"profiling.max_memory_gb: {limit:g}" in plan.why
        assert "7.00 GB" in plan.told()
    with pytest.raises(ConfigurationError, match=r"streamed 2\.00 GB; raise it, or lower"):
        choose_mode(job(tmp_path, tmp_path, tmp_path, max_memory_gb=1.0), predicted, {})
    del predicted["streamed"]
    with pytest.raises(ConfigurationError, match="streamed is not possible: it is built in memory"):
        choose_mode(
            job(tmp_path, tmp_path, tmp_path, max_memory_gb=1.0), predicted, {"streamed": "it is built in memory"}
        )


@pytest.mark.parametrize("mode", MODES)
def test_auto_runs_in_the_mode_that_it_chose(
    tmp_path: Path, tiny_bert_dir: Path, reviews_jsonl: Path, monkeypatch: pytest.MonkeyPatch, mode: str
):
    figures = dict.fromkeys(MODES, 1.5) | dict.fromkeys(MODES[: MODES.index(mode)], 3.0)
    monkeypatch.setattr("layerlens.jobs.load.predict_memory", lambda *arguments: figures)
    config = job(tiny_bert_dir, reviews_jsonl, tmp_path / "out", max_memory_gb=2.0)
    result = run_config(config, base_dir=tmp_path)
    assert result.manifest.provenance.memory_mode == mode
    assert bool(result.measured) == (mode != "streamed")


def test_predictions_are_of_a_likely_size(tmp_path: Path, tiny_bert_dir: Path, reviews_jsonl: Path):
    with pytest.raises(ConfigurationError) as found:
        run_config(job(tiny_bert_dir, reviews_jsonl, tmp_path / "out", max_memory_gb=0.01), base_dir=tmp_path)
    assert "plain" in str(found.value)
    assert "streamed" in str(found.value)
    config = job(tiny_bert_dir, reviews_jsonl, tmp_path / "out", max_memory_gb=1000.0)
    assert run_config(config, base_dir=tmp_path).manifest.provenance.memory_mode == "plain"


@pytest.mark.parametrize(
    ("profiling", "optimization", "named"),
    [
        ({"proxies": {"options": 4}}, {}, "profiling.proxies"),
        ({}, {"lora_initialization": "pca"}, "optimization.lora_initialization"),
        ({"statistics": ["time"]}, {}, "profiling.statistics: time"),
    ],
)
def test_what_streaming_cannot_give_is_refused_before_work(
    tmp_path: Path, tiny_bert_dir: Path, reviews_jsonl: Path, profiling: Any, optimization: Any, named: str
):
    config = job(tiny_bert_dir, reviews_jsonl, tmp_path / "out", memory_mode="streamed", **profiling)
    config = config.model_copy(update={"optimization": config.optimization.model_copy(update=optimization)})
    with pytest.raises(ConfigurationError, match=named):
        run_config(config, base_dir=tmp_path)


def test_a_model_of_timm_is_refused_by_name(tmp_path: Path, tiny_bert_dir: Path, reviews_jsonl: Path):
    config = job(tiny_bert_dir, reviews_jsonl, tmp_path / "out", memory_mode="streamed")
    config = config.model_copy(update={"model": config.model.model_copy(update={"name_or_path": "timm:resnet18"})})
    with pytest.raises(ModelSpecError, match="timm:resnet18 is built in memory by timm"):
        run_config(config, base_dir=tmp_path)
