"""LoRA on stacked experts and on what PEFT would take for them: stock PEFT loads, trains, saves and loads it again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from layerlens.config import LatencyProfile, OptimizationConfig
from layerlens.cost import cost_table
from layerlens.exceptions import ManifestError
from layerlens.integrations.layers import model_spec
from layerlens.integrations.peft import lora_config
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.methods import injected_sizes
from layerlens.models import Choice, LoraSettings, ModelFacts, ModelSpec, Option
from layerlens.tuning import apply, load, merge, save, unapply
from layerlens.tuning.baselines.baseline import BaselineRequest
from layerlens.tuning.baselines.plain import layers_with
from layerlens.tuning.export import export_adapter
from layerlens.tuning.initialization import beginnings_unmeasured

SMALL: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 4,
    "num_key_value_heads": 2, "intermediate_size": 24, "moe_intermediate_size": 12, "num_experts_per_tok": 2,
    "num_experts": 4, "num_local_experts": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
DEEPSEEK = {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 4, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip
CONFIGS = {
    "mixtral": lambda: hf.MixtralConfig(**SMALL),
    "gpt_oss": lambda: hf.GptOssConfig(**SMALL, sliding_window=4),
    "deepseek_v3": lambda: hf.DeepseekV3Config(**SMALL | DEEPSEEK),  # a dense block, and shared experts
}
IDS = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(1))


def fresh(name: str) -> Any:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.1)
    return model


def everywhere(model: Any) -> tuple[ModelSpec, Choice]:
    """LoRA of ranks 2, 3 and 4 on every layer that takes it."""
    spec = model_spec(PretrainedModel(model, None, None, "", ()), "tiny")
    able = [layer.name for layer in spec.layers if "lora" in layer.methods]
    options = tuple(Option(name, "lora", 2 + place % 3) for place, name in enumerate(able))
    return spec, Choice(options, lora=LoraSettings(2.0), task="causal-lm")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning", "ignore:Could not find a config file:UserWarning")
@pytest.mark.parametrize("name", CONFIGS)
def test_stock_peft_loads_trains_saves_and_loads(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    base = fresh(name)
    before = logits(base)
    spec, choice = everywhere(base)
    export_adapter(choice, base, tmp_path)
    tuned = PeftModel.from_pretrained(base, str(tmp_path / "peft"), is_trainable=True)
    assert (logits(tuned) - before).abs().max() == 0.0
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == choice.trainable_params(spec)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(3):
        tuned(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.abs().max() > 0 for key, p in tuned.named_parameters() if ".lora_B." in key)  # each of them moved
    expected = logits(tuned)
    tuned.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(fresh(name), str(tmp_path / "saved"))
    assert (logits(again) - expected).abs().max() == 0.0


@pytest.mark.parametrize("name", CONFIGS)
def test_apply_gives_every_layer_its_rank_and_comes_back(name: str, tmp_path: Path) -> None:
    base = fresh(name)
    before = logits(base)
    _, choice = everywhere(base)
    tuned = apply(base, choice)
    assert injected_sizes(tuned) == {one.layer: ("lora", one.rank) for one in choice.options}
    assert (logits(tuned) - before).abs().max() == 0.0
    with torch.no_grad():
        for key, parameter in tuned.named_parameters():
            if ".lora_B." in key:
                parameter.normal_(0.0, 0.1)
    expected = logits(tuned)
    assert (expected - before).abs().max() > 1e-2
    save(tuned, tmp_path)
    loaded = load(fresh(name), tmp_path)
    assert (logits(loaded) - expected).abs().max() == 0.0
    torch.testing.assert_close(logits(merge(loaded)), expected, rtol=1e-4, atol=1e-4)
    assert (logits(unapply(tuned)) - before).abs().max() == 0.0


def test_experts_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    base = fresh("mixtral")
    export_adapter(everywhere(base)[1], base, tmp_path)
    other = hf.MixtralForCausalLM(hf.MixtralConfig(**SMALL | {"num_experts": 3, "num_local_experts": 3}))
    with pytest.raises(ManifestError, match=r"experts.down_proj: lora_A.* does not fit 3 experts of 24 → 16"):
        load(other, tmp_path)


def test_layers_that_peft_would_rewrite_are_given_by_their_parameters() -> None:
    model = fresh("deepseek_v3")
    _, choice = everywhere(model)
    config = lora_config(choice, model)
    assert "model.layers.1.mlp.shared_experts.down_proj.weight" in config.target_parameters
    assert "model.layers.1.mlp.experts.gate_up_proj" in config.target_parameters
    assert not any(name.endswith(("gate_proj", "up_proj", "down_proj")) for name in config.target_modules)


def test_costs_are_those_of_all_experts() -> None:
    """W + ΔW of all experts is formed once for each call, whatever its tokens: 2·r·E·n_in·n_out FLOPs."""
    spec, _ = everywhere(fresh("mixtral"))
    layer = next(layer for layer in spec.layers if layer.layer_type == "experts")
    assert (layer.experts, layer.n_in, layer.n_out, layer.experts_per_token) == (4, 16, 48, 2)
    option = Option(layer.name, "lora", 8)
    found = {}
    for batch_size in (1, 3):
        profile = LatencyProfile(batch_size=batch_size, sequence_length=10)
        table = cost_table(spec, None, [option], OptimizationConfig(max_trainable_params=1, latency_profile=profile))
        found[batch_size] = table.cost__ro[:3, 0]
    params, flops, memory_gb = found[1]
    assert params == 4 * 8 * (16 + 48)
    assert flops == found[3][1] == 2 * 8 * 4 * 16 * 48
    kept = 4 * 16 * 48 + 10 * 2 * 16  # W + ΔW, and the inputs of both experts of each token
    assert memory_gb == pytest.approx(1e-9 * (16 * params + 4 * kept))


def test_a_measured_beginning_leaves_experts_to_peft_and_says_so() -> None:
    base = fresh("mixtral")
    _, choice = everywhere(base)
    assert beginnings_unmeasured(base, choice) == ""
    measured = replace(choice, lora=replace(choice.lora, initialization="pca"))
    assert "LoRA on 4 stacked experts (model.layers.0.mlp.experts.gate_up_proj ...)" in beginnings_unmeasured(
        base, measured
    )


def test_baselines_and_studies_say_that_they_leave_experts_alone() -> None:
    base = fresh("mixtral")
    spec, _ = everywhere(base)
    request = BaselineRequest(base, spec, ModelFacts(task="causal-lm"), budget=10_000)
    with pytest.warns(UserWarning, match=r"baseline: 4 stacked experts or embeddings .* stay unchanged"):
        layers = layers_with(request, "lora")
    assert not any(layer.layer_type == "experts" for layer in layers)
