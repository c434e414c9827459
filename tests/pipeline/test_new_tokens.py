"""A tokenizer with more tokens than the checkpoint has rows: said, resized, trained, merged; by file and in memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from peft import PeftModel, get_peft_model
from typer.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode does not let test files import neighbours

import tokenizers_of_ones_own as own

import layerlens
from layerlens.cli.main import app
from layerlens.exceptions import ConfigurationError
from layerlens.manifest import read_manifest
from layerlens.tuning import load

MARKERS = ["<|call|>", "<|end|>"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, a tokenizer with two tokens more, and rows that have them."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(folder: Path, *, tied: bool = False, rows: int = 0, markers: bool = True) -> int:
    """The number of tokens of the checkpoint; ``rows`` are those of its embeddings, as many as tokens unless given."""
    tokenizer = own.llama()
    config = hf.LlamaConfig(
        vocab_size=rows or len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32, initializer_range=0.2, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    hf.LlamaForCausalLM(config).save_pretrained(folder / "model")
    old = len(tokenizer)
    tokenizer.add_tokens(MARKERS if markers else [], special_tokens=True)
    tokenizer.save_pretrained(folder / "model")
    texts = [f"<|call|> the sum of {i} and {i + 1} <|end|> is {2 * i + 1}" for i in range(60)]
    (folder / "d.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (folder / "plain.jsonl").write_text("\n".join(json.dumps({"text": f"a sum of {i}"}) for i in range(60)))
    return old


def configured(folder: Path, data: str = "d.jsonl", **model: Any) -> None:
    settings = {
        "model": {"name_or_path": "./model", "task": "causal-lm", **model},
        "data": {"source": data, "calibration_samples": 16, "max_length": 24, "batch_size": 8},
        "optimization": {
            "max_trainable_params": 40_000, "lora_ranks": [1, 2], "methods": ["lora"],
            "latency_profile": {"batch_size": 2, "sequence_length": 16},
        },
        "training": {"max_steps": 3, "batch_size": 4, "learning_rate": 0.01},
        "runtime": {"threads": 1},
    }  # fmt: skip
    (folder / "c.yaml").write_text(yaml.safe_dump(settings))


def called(*command: str) -> Result:
    return CliRunner().invoke(app, list(command))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


@pytest.mark.parametrize(
    ("tied", "by"), [(False, "trainable_token_indices"), (True, "trainable_token_indices"), (True, "modules_to_save")]
)
def test_run_train_apply_and_merge(folder: Path, tied: bool, by: str):
    old = saved(folder, tied=tied)
    configured(folder, resize_token_embeddings=True, token_training=by)
    for command in (
        ["run", "c.yaml", "-o", "out"],
        ["apply", "out/manifest.json", "-o", "again"],
        ["train", "out/manifest.json", "-o", "tuned"],
        ["export", "tuned", "--merge", "-o", "merged"],
    ):
        result = called(*command)
        assert result.exit_code == 0, result.output
        if command[0] == "run":
            said = " ".join(result.output.split())
            assert f"are trained with the choice ({by})" in said
            assert "exactly 0" in said
    manifest = read_manifest(Path("out/manifest.json"))
    tokens = manifest.model.token_training
    assert tokens is not None
    whole = by == "modules_to_save"
    assert tokens.trainable_params == ((old + 2) * 16 if whole else 2 * 16 * (1 if tied else 2))
    use = next(one for one in manifest.resources if one.resource == "trainable_params")
    assert use.base == tokens.trainable_params
    assert use.total == tokens.trainable_params + manifest.trainable_params <= 40_000
    # By the configuration alone, the same costs; sums of some float64 numbers, in another order.
    for ours_, recorded in zip(layerlens.estimate(manifest).resources, manifest.resources, strict=True):
        assert ours_.total == pytest.approx(recorded.total, rel=1e-12), (ours_, recorded)
    exported, anew = (Path(place) / "adapter_model.safetensors" for place in ("out/peft", "again/peft"))
    assert exported.read_bytes() == anew.read_bytes()  # the same rows are drawn again
    base = hf.AutoModelForCausalLM.from_pretrained("model")
    base.resize_token_embeddings(old + 2, mean_resizing=False)  # other draws: what is trained replaces them
    ids = torch.tensor([[1, old, 7, old + 1]])
    ours = logits(load(base, Path("tuned")), ids)
    again = hf.AutoModelForCausalLM.from_pretrained("model")
    again.resize_token_embeddings(old + 2, mean_resizing=False)
    assert torch.equal(logits(PeftModel.from_pretrained(again, "tuned"), ids), ours)
    merged = hf.AutoModelForCausalLM.from_pretrained("merged")
    assert merged.config.vocab_size == old + 2 == len(hf.AutoTokenizer.from_pretrained("merged"))
    # W + (alpha/r)·B·A rounds once for each weight, at 2^-24; logits are sums of some ten of them.
    assert torch.allclose(logits(merged, ids), ours, atol=1e-5)


def test_without_the_key_it_is_refused_or_said(folder: Path):
    old = saved(folder)
    configured(folder)
    refused = called("run", "c.yaml", "-o", "out")
    said = " ".join(refused.output.split())
    assert refused.exit_code == 2
    assert f"embeddings for {old} tokens, its tokenizer {old + 2}; set model.resize_token_embeddings: true" in said
    assert not Path("out").exists()
    configured(folder, data="plain.jsonl")
    run = called("run", "c.yaml", "-o", "out")
    said = " ".join(run.output.split())
    assert run.exit_code == 0
    assert f"the tokenizer has {old + 2} tokens, and the model has embeddings for {old}" in said


def test_a_padded_vocabulary_needs_nothing_and_says_nothing(folder: Path):
    saved(folder, rows=2000)
    configured(folder)
    run = called("run", "c.yaml", "-o", "out")
    assert run.exit_code == 0, run.output
    assert "embeddings" not in run.output
    configured(folder, resize_token_embeddings=True)
    same = called("run", "c.yaml", "-o", "same")
    assert same.exit_code == 0, same.output
    manifests = [read_manifest(Path(place) / "manifest.json") for place in ("out", "same")]
    assert manifests[1].model.tokens is None
    assert manifests[0].model.fingerprint == manifests[1].model.fingerprint
    configured(folder, trainable_tokens=MARKERS)  # their rows were padding, so they are trained by name
    named = called("run", "c.yaml", "-o", "named")
    assert named.exit_code == 0, named.output
    tokens = read_manifest(Path("named/manifest.json")).model.token_training
    assert tokens is not None
    assert (len(tokens.indices), tokens.rows) == (2, 2000)


def test_a_budget_below_the_rows_alone_is_refused_with_the_least_that_would_do(folder: Path):
    saved(folder)
    configured(folder, resize_token_embeddings=True, token_training="modules_to_save")
    run = called("run", "c.yaml", "-o", "out", "--set", "optimization.max_trainable_params=1000")
    assert run.exit_code != 0
    assert "max_trainable_params" in run.output
    assert not Path("out").exists()


def test_in_memory(folder: Path):
    old = saved(folder)
    model: Any = hf.AutoModelForCausalLM.from_pretrained("model")
    tokenizer = hf.AutoTokenizer.from_pretrained("model")
    rows = [json.loads(line) for line in Path("d.jsonl").read_text().splitlines()]
    settings: dict[str, Any] = {
        "tokenizer": tokenizer,
        "max_trainable_params": 4000,
        "max_length": 24,
        "calibration_samples": 16,
    }
    with pytest.raises(ConfigurationError, match=r"of a model in memory, call resize_token_embeddings"):
        layerlens.plan(model, rows, **settings)
    with pytest.raises(ConfigurationError, match=r"LayerLens does not change your model; call"):
        layerlens.plan(model, rows, resize_token_embeddings=True, **settings)
    model.resize_token_embeddings(len(tokenizer))
    plain = layerlens.plan(model, rows, **settings)
    assert plain.manifest.model.tokens is None  # which rows are new, nobody has said
    plan = layerlens.plan(model, rows, trainable_tokens=MARKERS, **settings)
    assert plan.choice.token_indices == {name: [old, old + 1] for name in ("model.embed_tokens", "lm_head")}
    adapted = get_peft_model(model, plan.lora_config())
    counted = adapted.get_nb_trainable_parameters()[0]
    assert counted == plan.manifest.trainable_params + 2 * 2 * 16 <= 4000
    plan.save(folder / "plan", adapted.unload())
    assert (folder / "plan" / "peft" / "adapter_config.json").is_file()
