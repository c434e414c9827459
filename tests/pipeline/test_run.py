"""The whole job on a tiny real model: what is written, from what, and what is left when something goes wrong."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from layerlens.config import RunConfig
from layerlens.data import load_dataset
from layerlens.exceptions import (
    ActivationCacheError,
    ConfigurationError,
    DataError,
    InfeasibleError,
    ModelNotFoundError,
    OutputError,
    ProfilingError,
)
from layerlens.manifest import read_manifest
from layerlens.pipeline import RunResult, optimize_statistics, run_config
from layerlens.profiling.statistics_file import load_statistics, statistics_to_bytes
from layerlens.utils.progress import silent


def run(settings: dict[str, Any], base_dir: Path, **options: Any) -> RunResult:
    return run_config(RunConfig.model_validate(settings), base_dir=base_dir, **options)


def without_timestamp(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content.pop("created_at")
    return content


def test_it_writes_everything_that_it_names(settings, tmp_path):
    result = run(settings, tmp_path)
    assert result.directory == tmp_path / "out"
    assert {"manifest_json", "manifest_yaml", "statistics", "report"} <= result.files.keys()
    assert all(path.exists() and path.is_relative_to(result.directory) for path in result.files.values())
    assert (
        read_manifest(result.files["manifest_json"]) == result.manifest == read_manifest(result.files["manifest_yaml"])
    )
    manifest = result.manifest
    assert len(manifest.allocations) == 2 * (6 + 1)
    assert any(row.method != "none" for row in manifest.allocations)
    assert manifest.status == "optimal"
    assert manifest.gap <= settings.get("gap_tolerance", 1e-6)
    limited = [use for use in manifest.resources if use.budget is not None]
    assert [use.resource for use in limited] == ["trainable_params", "flops", "vram_gb", "latency_ms"]
    assert all(use.total <= use.budget for use in limited)
    by_resource = {use.resource: use for use in manifest.resources}
    assert by_resource["trainable_params"].added == sum(row.cost for row in manifest.allocations)


def test_predictions_hold_on_the_injected_model(settings, tmp_path):
    measured = run(settings, tmp_path).measured
    assert measured["step_zero_max_abs_delta"] == 0.0
    assert measured["trainable_params"]["relative_error"] == 0.0
    # Kept activations are an upper bound: nothing may be missing, and on this tiny model they are a small part.
    assert 0.0 <= measured["vram_gb"]["relative_error"] < 0.25
    assert abs(measured["flops"]["relative_error"]) < 0.02


@pytest.mark.parametrize("method", ["lora", "adapter", "prefix"])
def test_added_flops_of_every_method_are_what_torch_counts(settings, tmp_path, method):
    settings["optimization"]["methods"] = [method]
    settings["profiling"]["utility_model"] = "uniform"
    measured = run(settings, tmp_path).measured
    assert measured["flops"]["predicted"] > 0
    assert measured["flops"]["relative_error"] == pytest.approx(0.0, abs=1e-12)


def test_a_second_run_takes_the_statistics_from_the_cache(settings, tmp_path):
    first = run(settings, tmp_path)
    second = run(settings, tmp_path)
    assert not first.statistics_from_cache
    assert second.statistics_from_cache
    assert without_timestamp(first.files["manifest_json"]) == without_timestamp(second.files["manifest_json"])
    settings["optimization"]["max_trainable_params"] = 700  # budgets are not part of what was measured
    assert run(settings, tmp_path).statistics_from_cache
    settings["data"]["max_length"] = 12
    assert not run(settings, tmp_path).statistics_from_cache


def test_two_runs_that_share_nothing_give_the_same_bytes(settings, tmp_path, afresh):
    contents = []
    for name in ("one", "two"):
        settings["runtime"]["cache_dir"] = f"cache-{name}"
        settings["output"] = {"directory": f"out-{name}"}
        torch.manual_seed(len(contents))  # the caller's random state has no influence
        result = run(settings, tmp_path)
        created = json.loads(result.files["manifest_json"].read_text())["created_at"]
        assert not result.statistics_from_cache
        contents.append(
            {
                path.relative_to(result.directory): path.read_bytes().replace(created.encode(), b"")
                for path in sorted(result.directory.rglob("*"))
                if path.is_file() and path.name not in ("report.html", "solver_log.jsonl")  # these hold measured times
            }
        )
    assert contents[0].keys() == contents[1].keys()
    for name, content in contents[0].items():
        assert content == contents[1][name], name


def test_optimize_chooses_the_same_from_the_saved_statistics(settings, tmp_path):
    result = run(settings, tmp_path)
    settings["output"] = {"directory": "again"}
    again = optimize_statistics(result.files["statistics"], RunConfig.model_validate(settings), base_dir=tmp_path)
    assert again.manifest.allocations == result.manifest.allocations
    assert again.manifest.model == result.manifest.model
    settings["optimization"]["max_trainable_params"] = 300
    tighter = optimize_statistics(result.files["statistics"], RunConfig.model_validate(settings), base_dir=tmp_path)
    assert tighter.manifest.score < result.manifest.score


def test_optimize_into_the_run_s_own_directory_keeps_the_statistics_and_drops_the_old_adapter(settings, tmp_path):
    result = run(settings, tmp_path)
    assert result.files["peft"].is_dir()
    again = optimize_statistics(result.files["statistics"], RunConfig.model_validate(settings), base_dir=tmp_path)
    assert again.directory == result.directory
    assert result.files["statistics"].is_file()
    assert not result.files["peft"].exists()  # it belonged to the choice that was replaced


@pytest.mark.parametrize("utility_model", ["whitened", "gradient", "weighted", "uniform"])
def test_every_utility_model_runs(settings, tmp_path, utility_model):
    settings["profiling"]["utility_model"] = utility_model
    result = run(settings, tmp_path)
    assert result.manifest.utility_model == utility_model
    assert any(row.method != "none" for row in result.manifest.allocations)


def test_less_data_than_asked_for_is_said(settings, tmp_path):
    settings["data"]["calibration_samples"] = 10_000
    told: list[str] = []
    result = run(settings, tmp_path, warn=told.append)
    assert told == list(result.warnings)
    # A busy machine, and budgets that cannot bind, are said too.
    told = [line for line in told if not line.startswith("latency") and "cannot bind" not in line]
    assert len(told) == 3
    assert told[0].startswith("model.task: sequence-classification, guessed from")
    assert "data.calibration_samples: asked for 10000" in told[1]
    assert "model.head_fit_samples" in told[2]


def test_a_choice_of_nothing_is_said(settings, tmp_path):
    settings["optimization"]["methods"] = ["prefix"]  # whose gain on this random model is all sampling noise
    settings["profiling"]["utility_model"] = "signal"  # which takes the noise off
    result = run(settings, tmp_path)
    assert all(row.method == "none" for row in result.manifest.allocations)
    assert "peft" not in result.files
    assert any("no option has a gain above its sampling noise" in line for line in result.warnings)


@pytest.mark.parametrize(
    ("section", "values", "error", "message"),
    [
        ("model", {"name_or_path": "./nowhere"}, ModelNotFoundError, "no model directory at"),
        ("model", {"name_or_path": "package:no_such_package"}, ModelNotFoundError, "pip install no-such-package"),
        ("model", {"name_or_path": "package:json"}, ModelNotFoundError, r"has no get_model_path\(\)"),
        ("data", {"source": "nowhere.csv"}, DataError, "no file at"),
        ("data", {"text_column": "txt"}, DataError, "has no column 'txt'.*did you mean 'text'"),
        ("data", {"max_length": 1000}, ConfigurationError, r"data\.max_length: 1000 tokens, but the model has 64"),
        ("optimization", {"max_trainable_params": 3}, InfeasibleError, "max_trainable_params: 3 is .*smallest"),
        ("optimization", {"max_vram_gb": 1e-6}, InfeasibleError, "max_vram_gb"),
        ("output", {"directory": "/proc/layerlens"}, OutputError, "cannot write /proc/layerlens"),
    ],
)
def test_what_cannot_work_says_so_and_writes_nothing(settings, tmp_path, section, values, error, message):
    settings.setdefault(section, {}).update(values)
    with pytest.raises(error, match=message):
        run(settings, tmp_path)
    assert not (tmp_path / "out").exists()


def test_nan_weights_are_refused_and_not_cached(settings, tmp_path, tiny_bert_dir):
    from transformers import AutoModel, AutoTokenizer

    broken = tmp_path / "broken"
    model = AutoModel.from_pretrained(tiny_bert_dir)
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    model.save_pretrained(broken)
    AutoTokenizer.from_pretrained(tiny_bert_dir).save_pretrained(broken)
    settings["model"]["name_or_path"] = str(broken)
    for head_fit_samples in (0, 32):
        settings["model"]["head_fit_samples"] = head_fit_samples
        with pytest.raises(ProfilingError, match=r"nan|not finite"):
            run(settings, tmp_path)
    assert not list((tmp_path / "cache" / "blobs").iterdir())


def test_nan_in_saved_statistics_is_refused_by_layer(settings, tmp_path):
    result = run(settings, tmp_path)
    spec, statistics = load_statistics(result.files["statistics"])
    object.__setattr__(statistics.layers[3].by_method["lora"], "energy", float("nan"))
    path = tmp_path / "nan.safetensors"
    path.write_bytes(statistics_to_bytes(spec, statistics))
    with pytest.raises(ActivationCacheError, match=rf"{statistics.layers[3].layer}: lora: energy must be a finite"):
        optimize_statistics(path, RunConfig.model_validate(settings), base_dir=tmp_path)
    with pytest.raises(ActivationCacheError, match="no statistics file"):
        optimize_statistics(tmp_path / "none", RunConfig.model_validate(settings), base_dir=tmp_path)


@pytest.mark.parametrize("where", ["Fitting the task head", "Measuring gradients", "Checking predictions"])
def test_an_interrupt_leaves_the_last_results_and_a_cache_that_works(settings, tmp_path, where):
    class Interrupted:
        @contextmanager
        def stage(self, description: str, total: int | None = None) -> Iterator[Any]:
            with silent.stage(description, total) as advance:
                if description == where:
                    raise KeyboardInterrupt
                yield advance

    result = run(settings, tmp_path, use_cache=False)
    before = {path: path.read_bytes() for path in result.directory.rglob("*") if path.is_file()}
    settings["optimization"]["max_trainable_params"] = 700
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path, progress=Interrupted())
    after = {path: path.read_bytes() for path in result.directory.rglob("*") if path.is_file()}
    assert after == before
    assert not [path for path in tmp_path.iterdir() if path.name not in ("out", "cache")]
    assert run(settings, tmp_path).manifest.status == "optimal"


def test_the_statistics_file_says_what_was_measured(settings, tmp_path):
    _, statistics = load_statistics(run(settings, tmp_path).files["statistics"])
    assert statistics.n_samples == 24
    assert statistics.provenance["identity"]["settings"]["max_length"] == 16
    assert statistics.activation_bytes > 0
    # 2 FLOPs for each weight of the blocks' matrices (2 · 8,192), plus attention scores and the pooler.
    assert statistics.forward_flops > 2 * 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert np.isfinite(statistics.mean_loss)


def test_statistics_that_do_not_say_where_they_come_from_are_refused(settings, saved_statistics, tmp_path):
    spec, statistics = load_statistics(saved_statistics)
    path = tmp_path / "bare.safetensors"
    path.write_bytes(statistics_to_bytes(spec, dataclasses.replace(statistics, provenance={})))
    with pytest.raises(ActivationCacheError, match="does not say which model and data"):
        optimize_statistics(path, RunConfig.model_validate(settings), base_dir=tmp_path)


def test_the_solver_s_log_and_every_layer_s_runner_up_are_told(settings, tmp_path):
    result = run(settings, tmp_path)
    events = [json.loads(line) for line in result.files["solver_log"].read_text(encoding="utf-8").splitlines()]
    assert events[-1]["value"] == pytest.approx(result.manifest.score)
    bounds = [event["upper_bound"] for event in events]
    assert bounds == sorted(bounds, reverse=True)
    assert [name for each in result.explanations for name in each.layers] == [
        row.layer for row in result.manifest.allocations
    ]
    page = result.files["report"].read_text(encoding="utf-8")
    assert "How the solver got there" in page
    assert "Runner-up" in page


def mean_loss_of(model: torch.nn.Module, tokenizer_path: Path, settings: dict[str, Any]) -> float:
    """Mean loss on the calibration samples, sample by sample, labels taken by their names."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    dataset = load_dataset(RunConfig.model_validate(settings).data)
    calibration, _ = dataset.split(settings["data"]["calibration_samples"], 0, 0)
    losses = []
    model.requires_grad_(False)
    for text, label in zip(calibration.texts, calibration.labels, strict=True):
        inputs = tokenizer(text, truncation=True, max_length=settings["data"]["max_length"], return_tensors="pt")
        target = torch.tensor([model.config.label2id[calibration.label_names[int(label)]]])
        losses.append(float(torch.nn.functional.cross_entropy(model(**inputs).logits, target)))
    return float(np.mean(losses))


def test_a_checkpoint_with_a_head_of_its_own_keeps_its_order_of_classes(settings, tmp_path, tiny_bert_dir):
    from transformers import AutoTokenizer, BertForSequenceClassification

    own = BertForSequenceClassification.from_pretrained(
        tiny_bert_dir, num_labels=2, id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1}
    )
    own.save_pretrained(tmp_path / "own")
    AutoTokenizer.from_pretrained(tiny_bert_dir).save_pretrained(tmp_path / "own")
    settings["model"]["name_or_path"] = "own"
    result = run(settings, tmp_path)
    assert result.manifest.model.labels == ("good", "bad")  # alphabetical order would turn every label round
    assert result.manifest.model.head_modules == ("classifier",)
    _, statistics = load_statistics(result.files["statistics"])
    loss = mean_loss_of(own.eval(), tmp_path / "own", settings)
    assert statistics.mean_loss == pytest.approx(loss, rel=1e-5)
