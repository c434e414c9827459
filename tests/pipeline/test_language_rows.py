"""The whole job on a language model's rows: what is measured is what is trained, DPO and going on from SFT included."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from layerlens.cli.main import app
from layerlens.config import RunConfig
from layerlens.exceptions import ConfigurationError
from layerlens.manifest import read_manifest
from layerlens.pipeline import run_config
from layerlens.sources import load_pretrained
from layerlens.tuning import load

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))
from language_support import language_model, tokenizer

WORDS = ["yes", "no", "never", "in the end"]
TEXTS = [{"text": f"{WORDS[n % 4]} is"} for n in range(60)]
ANSWERED = [{"question": f"is {n}?", "answer": WORDS[n % 4]} for n in range(60)]
PAIRS = [{"prompt": f"is {n}?", "chosen": " yes", "rejected": " no"} for n in range(60)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with logits of a trained size."""
    directory = tmp_path_factory.mktemp("llama")
    made = language_model(tokenizer())
    made.model.lm_head.weight.data.mul_(8.0)
    made.model.save_pretrained(directory)
    made.tokenizer.save_pretrained(directory)
    return directory


def job(folder: Path, model: Path, rows: list[dict[str, Any]], name: str = "c", **training: Any) -> RunConfig:
    """NAME.yaml and its rows."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "model": {"name_or_path": str(model), "task": "causal-lm"},
        "data": {"source": f"{name}.jsonl", "calibration_samples": 12, "max_length": 32, "batch_size": 6},
        "profiling": {"memory_mode": "plain"},
        "optimization": {
            "max_trainable_params": 2000, "methods": ["lora"], "lora_ranks": [1, 2, 4],
            "latency_profile": {"batch_size": 2, "sequence_length": 16},
        },
        "training": {"max_steps": 30, "batch_size": 8, "learning_rate": 1e-2, "eval_samples": 8, "seed": 0, **training},
        "runtime": {"threads": 1, "cache_dir": "cache"},
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return RunConfig.model_validate(settings)


def train(folder: Path, name: str, output: str, *more: str) -> Result:
    arguments = ["train", str(folder / "out/manifest.json"), "-c", str(folder / f"{name}.yaml"), "--json"]
    return CliRunner().invoke(app, [*arguments, "-o", str(folder / output), *more])


def utilities(folder: Path) -> list[float]:
    return [row.utility for row in read_manifest(folder / "out/manifest.json").allocations]


def test_the_answers_decide_what_is_chosen(tmp_path, model):
    found = []
    for name, rows in (("a", ANSWERED), ("b", [{**row, "answer": "it is the one"} for row in ANSWERED])):
        (tmp_path / name).mkdir()
        run_config(job(tmp_path / name, model, rows), base_dir=tmp_path / name)
        found.append(utilities(tmp_path / name))
    assert found[0] != found[1]


def test_the_end_of_a_text_is_learnt(tmp_path, model):
    run_config(job(tmp_path, model, TEXTS, max_steps=150, learning_rate=2e-2, keep_best=False), base_dir=tmp_path)
    assert train(tmp_path, "c", "tuned").exit_code == 0
    base = load_pretrained(str(model), "causal-lm", [])
    tuned = load(base.model, tmp_path / "tuned", trainable=False).eval()
    ids = base.tokenizer("yes is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        end = tuned(ids).logits[0, -1].softmax(-1)[base.tokenizer.eos_token_id]
    assert float(end) > 0.5


def test_from_answers_to_preferences(tmp_path, model):
    """SFT, then DPO: measured and trained pair by pair, and the second training begins where the first has ended."""
    result = run_config(job(tmp_path, model, PAIRS, "pairs"), base_dir=tmp_path)
    assert result.manifest.model.task == "causal-lm"
    job(tmp_path, model, ANSWERED, "answers")
    assert train(tmp_path, "answers", "sft").exit_code == 0
    second = train(tmp_path, "pairs", "dpo", "--from", str(tmp_path / "sft"))
    assert second.exit_code == 0, second.stderr
    figures = json.loads((tmp_path / "dpo/metrics.json").read_text())
    assert figures["task"] == "dpo"
    assert figures["before"]["loss"] == pytest.approx(0.693147, abs=1e-4)  # the reference is where it starts
    assert figures["after"]["loss"] < 0.5
    assert figures["after"]["preferred"] == 1.0
    first, last = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("sft", "dpo"))
    assert first.keys() == last.keys()
    fresh = train(tmp_path, "pairs", "fresh")
    assert fresh.exit_code == 0, fresh.stderr
    moved = sum(float((last[name] - first[name]).square().sum()) for name in first)
    unlike = load_file(tmp_path / "fresh/adapter_model.safetensors")
    assert moved < sum(float((unlike[name] - first[name]).square().sum()) for name in first)


def test_going_on_from_another_choice_is_refused(tmp_path, model):
    run_config(job(tmp_path, model, ANSWERED), base_dir=tmp_path)
    assert train(tmp_path, "c", "sft").exit_code == 0
    config = tmp_path / "sft/adapter_config.json"
    other = tmp_path / "other"
    other.mkdir()
    smaller = job(other, model, ANSWERED)
    smaller = smaller.model_copy(
        update={"optimization": smaller.optimization.model_copy(update={"max_trainable_params": 300})}
    )
    run_config(smaller, base_dir=other)
    refused = train(other, "c", "tuned", "--from", str(config.parent))
    assert refused.exit_code != 0
    assert "give the manifest.json that lies in that directory" in " ".join(refused.stderr.split())
    both = train(tmp_path, "c", "tuned", "--from", str(config.parent), "--baseline", "uniform-lora")
    assert "give one" in both.stderr


@pytest.mark.parametrize("mode", ["checkpointed", "streamed"])
def test_pairs_are_measured_alike_however_the_model_is_held(tmp_path, model, mode):
    plain = job(tmp_path, model, PAIRS)
    run_config(plain, base_dir=tmp_path)
    expected = utilities(tmp_path)
    other = plain.model_copy(update={"profiling": plain.profiling.model_copy(update={"memory_mode": mode})})
    run_config(other, base_dir=tmp_path)
    assert utilities(tmp_path) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("packing", ["bfd_split", "wrapped"])
def test_packed_texts_are_measured_and_trained(tmp_path, model, packing):
    texts = [{"text": f"{n} is in the end"} for n in range(60)]
    config = job(tmp_path, model, [*texts, {"text": "in the end " * 40}], max_steps=4)
    config = config.model_copy(update={"data": config.data.model_copy(update={"packing": packing})})
    result = run_config(config, base_dir=tmp_path)
    assert any("texts are packed into" in line for line in result.warnings)
    trained = train(tmp_path, "c", "tuned", "--set", f"data.packing={packing}")
    assert trained.exit_code == 0, trained.stderr
    facts = json.loads((tmp_path / "tuned/metrics.json").read_text())
    assert facts["after"]["loss"] != facts["before"]["loss"]


def test_packing_of_another_task_is_refused(tmp_path, model):
    config = job(tmp_path, model, TEXTS)
    config = config.model_copy(update={
        "model": config.model.model_copy(update={"task": "masked-lm"}),
        "data": config.data.model_copy(update={"packing": "bfd"}),
    })  # fmt: skip
    with pytest.raises(ConfigurationError, match=r"data\.packing: bfd is for causal-lm, not for masked-lm"):
        run_config(config, base_dir=tmp_path)


def test_proxies_and_a_named_task_take_pairs(tmp_path, model):
    config = job(tmp_path, model, PAIRS)
    proxies = config.profiling.proxies.model_copy(update={"options": 2, "steps": 3, "held_out_samples": 8})
    config = config.model_copy(update={
        "model": config.model.model_copy(update={"task": "dpo"}),
        "profiling": config.profiling.model_copy(update={"proxies": proxies}),
    })  # fmt: skip
    result = run_config(config, base_dir=tmp_path)
    assert result.manifest.model.task == "dpo"
    assert result.manifest.allocations
