"""``profiling.layers``: one tower, or the output layer beside the blocks; what it cannot name is said."""

from __future__ import annotations

import pytest
import transformers as hf

from layerlens.config import RunConfig
from layerlens.exceptions import ConfigurationError, ModelSpecError
from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.optimization.constraints import matching


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
    assert "embeddings" in spec.left_out["model.embed_tokens"]
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
