"""Stacked experts: statistics equal brute-force autograd, one backward pass per sample; routers are left alone.

float64 and transformers' own loop over the experts on the other side: both routes round at 2^-53 and sum some thousand
products, so 1e-9 leaves four decimal digits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from brute_force import pieces, profile, sample_gradients

from layerlens.integrations.expert_products import plain_products
from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.jobs.estimate import Batch as LatencyBatch
from layerlens.jobs.estimate import estimate_lora
from layerlens.models import ModelSpec
from layerlens.models.statistics import EXPERT_TOKENS
from layerlens.profiling.footprint import frozen_footprint
from layerlens.tasks.batches import Batch
from layerlens.tasks.losses import causal_loss

RELATIVE = 1e-9
N, T, VOCABULARY, EXPERTS = 5, 6, 40, 4
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 4,
    "num_key_value_heads": 2, "intermediate_size": 24, "moe_intermediate_size": 12, "num_experts_per_tok": 2,
    "num_experts": EXPERTS, "num_local_experts": EXPERTS, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
DEEPSEEK = {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 4, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip
CONFIGS = {
    "mixtral": hf.MixtralConfig(**SMALL),
    "qwen3_moe": hf.Qwen3MoeConfig(**SMALL),
    "gpt_oss": hf.GptOssConfig(**SMALL, sliding_window=4),  # transposed weights, with biases
    "deepseek_v3": hf.DeepseekV3Config(**SMALL | DEEPSEEK),
}


def built(config: Any) -> tuple[Any, ModelSpec]:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, experts_implementation="eager").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    return model, model_spec(PretrainedModel(model, None, None, "", ()), "tiny")


def batch() -> Batch:
    """With padding, and one sample of padding but for two tokens."""
    ids = torch.randint(1, VOCABULARY, (N, T), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 4:] = mask[3, 2:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    return Batch(inputs, ids.masked_fill(mask == 0, -100), torch.arange(N))


@pytest.mark.parametrize("name", CONFIGS)
def test_statistics_of_stacked_experts_equal_brute_force(name: str) -> None:
    model, spec = built(CONFIGS[name])
    whole = batch()
    names = ("fisher", "gradient", "input_scale", "factors", "whitened_spectrum")
    found = profile(model, spec, pieces(whole, 2, 3), causal_loss, statistics=names, everything=False)
    gradients = sample_gradients(model, whole, causal_loss)
    stacked = [layer for layer in spec.layers if layer.layer_type == "experts"]
    assert [layer.name.rpartition(".")[2] for layer in stacked[:2]] == ["gate_up_proj", "down_proj"]
    seen = rows_by_expert(model, whole)
    for layer in stacked:
        measured, each = found.by_name()[layer.name].by_method["lora"], gradients[layer.name]
        energy, trace = np.square(each.mean(axis=0)).sum(), np.square(each).sum(axis=1).mean()
        assert measured.energy == pytest.approx(energy, rel=RELATIVE)
        assert measured.trace == pytest.approx(trace, rel=RELATIVE)
        rows = seen[layer.name]
        assert (measured.extra or {})[EXPERT_TOKENS].tolist() == [len(of) for of in rows]
        mean_square = torch.cat(rows).square().mean().item()
        assert measured.input_mean_square == pytest.approx(mean_square, rel=RELATIVE)
        for factor, of in zip(measured.input_factor, rows, strict=True):
            expected = of.T @ of / max(1, len(of))
            np.testing.assert_allclose(factor, expected.numpy(), rtol=1e-5, atol=1e-6)  # kept in float32
        assert measured.spectrum.shape[0] >= layer.experts


def rows_by_expert(model: Any, whole: Batch) -> dict[str, list[torch.Tensor]]:
    """Parameter -> the inputs of each expert, from transformers' own loop, padding left out."""
    found: dict[str, list[torch.Tensor]] = {}
    real = whole.inputs["attention_mask"].flatten().bool()

    def see(path: str, module: Any) -> Any:
        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            hidden, index = [*args, *kwargs.values()][:2]
            up, down = [], []
            for expert in range(EXPERTS):
                rows = hidden[(index == expert).any(dim=1) & real]
                weight, bias = module.gate_up_proj[expert], getattr(module, "gate_up_proj_bias", None)
                inner = rows @ (weight if module.is_transposed else weight.T) + (0 if bias is None else bias[expert])
                up.append(rows)
                down.append(module._apply_gate(inner))
            found[f"{path}.gate_up_proj"], found[f"{path}.down_proj"] = up, down

        return hook

    for path, module in model.named_modules():
        if path.endswith(".experts"):
            module.register_forward_hook(see(path, module), with_kwargs=True)
    with torch.no_grad():
        model(**whole.inputs)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_plain_products_are_what_the_model_computes(name: str) -> None:
    model, _ = built(CONFIGS[name])
    inputs = batch().inputs
    with torch.no_grad():
        usual = model(**inputs).logits
        with plain_products(model):
            plain = model(**inputs).logits
        again = model(**inputs).logits
    torch.testing.assert_close(plain, usual, rtol=RELATIVE, atol=RELATIVE)
    assert torch.equal(again, usual)  # the model's own function is back


def test_routers_and_biases_are_left_out_and_listed_with_their_sizes() -> None:
    _, spec = built(CONFIGS["gpt_oss"])
    router = spec.left_out["model.layers.0.mlp.router.weight"]
    assert router == "a router (4 × 16 = 64 parameters); routers are never adapted"
    assert "a bias for each expert" in spec.left_out["model.layers.0.mlp.experts.down_proj_bias"]
    assert not any("router" in layer.name or layer.name.endswith("gate") for layer in spec.layers)


def test_flops_are_those_of_the_experts_that_a_token_goes_to() -> None:
    """Every matrix product of the model by hand: 2 for each weight and token, those of two of four experts."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS["mixtral"], attn_implementation="eager").eval()
    ids = torch.ones(2, T, dtype=torch.int64)
    _, flops = frozen_footprint(model.requires_grad_(False), "model.layers.0", {"input_ids": ids})
    dense = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    attention = 2 * 2 * T * 16 * SMALL["num_hidden_layers"]  # q·k and p·v over all T positions
    assert flops == pytest.approx(2 * dense + 2 * experts * 2 / EXPERTS + attention, rel=1e-12)


def test_a_mixture_is_estimated_without_its_weights(tmp_path: Path) -> None:
    config = hf.MixtralConfig(**SMALL, architectures=["MixtralForCausalLM"])
    config.save_pretrained(tmp_path)
    found = estimate_lora(str(tmp_path), 8, targets=("gate_up_proj",), batch=LatencyBatch(1, T))
    assert found.trainable_params == SMALL["num_hidden_layers"] * 8 * EXPERTS * (16 + 48)
    dense = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 16 * EXPERTS) + 16 * VOCABULARY  # attention, routers, the output layer
    experts = 2 * (48 * 16 + 16 * 24) * 2  # of two experts for each token
    attention = 2 * 4 * T * T * 16  # of two blocks
    assert found.base_flops == 2 * T * (dense + experts) + attention


def test_tokens_of_each_expert_are_kept_for_the_manifest() -> None:
    from layerlens.jobs.data_facts import expert_tokens

    model, spec = built(CONFIGS["mixtral"])
    whole = batch()
    found = expert_tokens(profile(model, spec, [whole], causal_loss, statistics=("gradient",), everything=False))
    rows = rows_by_expert(model, whole)
    assert found == {
        f"model.layers.{block}.mlp.experts": [len(of) for of in rows[f"model.layers.{block}.mlp.experts.down_proj"]]
        for block in range(2)
    }


def test_experts_that_a_model_computes_in_its_own_way_are_left_out_by_name() -> None:
    """JetMoE: attention is a mixture too, so no block is known, and its routers are Linears without neighbours."""
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 4,
        "intermediate_size": 24, "num_local_experts": EXPERTS, "num_experts_per_tok": 2,
    }  # fmt: skip
    _, spec = built(hf.JetMoeConfig(**sizes, pad_token_id=0))
    assert {layer.name.rpartition(".")[2] for layer in spec.layers} == {"kv_proj"}
    assert "whose products cannot be measured" in spec.left_out["model.layers.0.mlp.input_linear.weight"]
    assert "a router" in spec.left_out["model.layers.0.mlp.router.layer"]
