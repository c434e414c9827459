"""``profiling.layers``: one tower, or the output layer beside the blocks; what it cannot name is said."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode does not let test files import neighbours

import tokenizers_of_ones_own as own

import layerlens
from layerlens.cli.main import app
from layerlens.config import RunConfig
from layerlens.exceptions import ConfigurationError, ModelSpecError
from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.manifest import read_manifest
from layerlens.optimization.constraints import matching
from layerlens.tuning import load


def llama(tied: bool = False) -> PretrainedModel:
    config = hf.LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return PretrainedModel(hf.LlamaForCausalLM(config).eval().requires_grad_(False), None, "", ())


def test_only_what_is_named_is_a_layer():
    spec = model_spec(llama(), "", only=("layers.1.mlp.*", "lm_head"))
    assert [layer.name for layer in spec.layers] == [
        *(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")), "lm_head",
    ]  # fmt: skip
    assert spec.layers[-1].block is None
    assert spec.left_out["model.layers.0.mlp.up_proj"] == "profiling.layers does not name it"


def test_a_tied_output_layer_and_embeddings_are_left_out_and_said():
    spec = model_spec(llama(tied=True), "", only=("layers.*", "lm_head", "embed_tokens"))
    assert "tied to model.embed_tokens" in spec.left_out["lm_head"]
    assert "tied to lm_head" in spec.left_out["model.embed_tokens"]
    assert len(spec.layers) == len(model_spec(llama(), "").layers)


def test_a_pattern_without_a_module_is_refused():
    with pytest.raises(ModelSpecError, match=r"profiling\.layers: the model has no module 'lm_heat'; nearest: lm_head"):
        model_spec(llama(), "", only=("lm_heat",))
    with pytest.raises(ModelSpecError, match="names no layer that can be adapted; lm_head: its weight is tied"):
        model_spec(llama(tied=True), "", only=("lm_head",))


def test_a_rule_for_layers_that_are_left_out_restricts_nothing_unless_it_requires_them():
    spec = model_spec(llama(), "", only=("layers.0.*",))
    assert matching(spec, "*layers.1.*", "rules[0].layers") == []
    with pytest.raises(ConfigurationError, match="no layer is called"):
        matching(spec, "*layers.7.*", "rules[0].layers")


def test_the_configuration_has_it():
    given = {"model": {"name_or_path": "x"}, "data": {"source": "d.jsonl"}, "optimization": {"max_vram_gb": 1}}
    config = RunConfig.model_validate({**given, "profiling": {"layers": ["language_model.*"]}})
    assert config.profiling.layers == ("language_model.*",)
    assert "layers" not in RunConfig.model_validate(given).model_dump()["profiling"]


def test_run_train_and_merge_with_embeddings_and_the_output_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = own.llama()
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [f'{{"text": "the sum of {i} and {i + 1} is {2 * i + 1}"}}' for i in range(60)]
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    (tmp_path / "c.yaml").write_text(
        "model: {name_or_path: ./model, task: causal-lm}\n"
        "data: {source: d.jsonl, calibration_samples: 16, max_length: 24, batch_size: 8}\n"
        "profiling: {layers: [lm_head, embed_tokens], utility_model: whitened}\n"
        "optimization: {max_trainable_params: 4000, lora_ranks: [1, 2], lora_initialization: pca,\n"
        "  latency_profile: {batch_size: 2, sequence_length: 16},\n"
        "  constraints: {rules: [{layers: embedding, methods: [lora], ranks: [2]}]}}\n"
        "training: {max_steps: 3, batch_size: 4, learning_rate: 0.01}\nruntime: {threads: 1}\n"
    )
    monkeypatch.chdir(tmp_path)
    for command in (
        ["run", "c.yaml", "-o", "out"],
        ["train", "out/manifest.json", "-o", "tuned"],
        ["export", "tuned", "--merge", "-o", "merged"],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    manifest = read_manifest(Path("out/manifest.json"))
    chosen = {row.layer: (row.method, row.rank, row.cost) for row in manifest.allocations}
    assert chosen["model.embed_tokens"] == ("lora", 2, 2 * (len(tokenizer) + 16))
    assert chosen["lm_head"][0] == "lora"
    for counted, recorded in zip(layerlens.estimate(manifest).resources, manifest.resources, strict=True):
        assert counted.total == pytest.approx(recorded.total, rel=1e-12), (counted, recorded)
    base, ids = hf.AutoModelForCausalLM.from_pretrained("model"), torch.tensor([[1, 5, 7, 3]])

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model.eval()(input_ids=ids).logits
        return found

    before, ours = logits(base), load(copy.deepcopy(base), Path("tuned"))
    after = logits(PeftModel.from_pretrained(base, "tuned"))
    assert not torch.equal(after, before)
    assert torch.equal(logits(ours), after)
    merged = hf.AutoModelForCausalLM.from_pretrained("merged")
    # W + (alpha/r)·B·A rounds once for each weight, at 2^-24; logits are sums of some ten of them.
    assert torch.allclose(logits(merged), after, atol=1e-5)
