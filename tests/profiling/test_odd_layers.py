"""Layers that do not see [samples, tokens, features]: measured right where that can be, else left out by name.

The models are float64: both routes round at 2^-53 and sum some thousand products, so 1e-9 leaves four decimal digits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from brute_force import assert_equal, pieces, profile, sample_gradients, weight_statistics

from layerlens.exceptions import ProfilingError
from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.models import LayerSpec, ModelSpec
from layerlens.models.model_spec import EXPERTS
from layerlens.tasks.batches import Batch
from layerlens.tasks.losses import IGNORED, causal_loss, classification_loss, token_loss

N, T, VOCABULARY = 5, 6, 40
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 24, "initializer_range": 0.3, "pad_token_id": 0, "max_position_embeddings": 16,
}  # fmt: skip
OPT = {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16, "init_std": 0.3}
MOE = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 16,
    "num_key_value_heads": 2,
}  # fmt: skip
DEBERTA = {
    "relative_attention": True, "position_buckets": 4, "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
    "max_relative_positions": -1, "position_biased_input": False, "norm_rel_ebd": "layer_norm",
}  # fmt: skip
LLAMA4 = {
    **SMALL, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 24, "num_key_value_heads": 2,
    "head_dim": 4, "attention_chunk_size": 16,
}  # fmt: skip


def text(labels: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    ids = torch.randint(1, VOCABULARY, (N, T), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row in range(1, N):
        mask[row, T - row % 4 :] = 0 if row % 4 else 1
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    return Batch(inputs, labels(ids).masked_fill(mask == 0, IGNORED), torch.arange(N))


def frozen(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    torch.manual_seed(0)
    model: Any = make().double().eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products are not made of float64
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and float(parameter.std()) < 0.1:
                parameter.normal_(0, 0.3)
    return model.requires_grad_(False)


def spec_of(model: torch.nn.Module) -> ModelSpec:
    """Its layers without stacks of experts, which have tests of their own."""
    spec = model_spec(PretrainedModel(model, None, "", ()), "tiny", adapter_sites="residual")
    return replace(spec, layers=[layer for layer in spec.layers if layer.layer_type != EXPERTS])


@pytest.mark.parametrize(
    ("make", "loss", "odd"),
    [
        (lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT)), causal_loss, "fc1"),
        (lambda: hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**SMALL, **MOE)), causal_loss, "shared_expert_gate"),
        (lambda: hf.DebertaV2ForMaskedLM(hf.DebertaV2Config(**SMALL, **DEBERTA)), token_loss, "key_proj"),
        (lambda: hf.FalconForCausalLM(hf.FalconConfig(**SMALL, bias=True)), causal_loss, "query_key_value"),
    ],
    ids=["opt", "qwen2-moe", "deberta-v2", "falcon"],
)  # fmt: skip
def test_layers_that_see_tokens_in_another_way_equal_one_backward_per_sample(make, loss, odd):
    model = frozen(make)
    batch = text(lambda ids: ids)
    spec = spec_of(model)
    measured = profile(model, spec, pieces(batch, 3, 2), loss, everything=False)
    assert not measured.unmeasured
    assert any(name.endswith(f"{odd}.weight") for name in weight_statistics(measured))
    assert_equal(measured, sample_gradients(model, batch, loss), 1e-9)
    whole = profile(model, spec, [batch], loss, everything=False)
    for name, found in weight_statistics(whole).items():
        assert found.energy == pytest.approx(weight_statistics(measured)[name].energy, rel=1e-9), name


def test_outputs_that_the_model_adds_to_in_place(monkeypatch: pytest.MonkeyPatch):
    # Llama 4's norms go down to float32, whose sums over a batch and over single samples round differently (1e-8 of the
    # energy with AVX-512). Everything stays in float64 here, so that the bound can be that of the others.
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    model = frozen(lambda: hf.Llama4ForCausalLM(hf.Llama4TextConfig(**LLAMA4)))
    batch = text(lambda ids: ids)
    measured = profile(model, spec_of(model), [batch], causal_loss, everything=False)
    assert "model.layers.0.feed_forward.shared_expert.down_proj" in measured.by_name()
    assert_equal(measured, sample_gradients(model, batch, causal_loss), 1e-9)


class Odd(torch.nn.Module):
    """Two layers and, between them, what ``between`` does with the inner one."""

    def __init__(self, between: Callable[[Odd, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.outer, self.inner, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.between(self, torch.tanh(self.outer(x))).mean(dim=1))


def mixed(model: Odd, h: torch.Tensor) -> torch.Tensor:
    """Tokens in the order of their values."""
    flat = h.reshape(-1, 4)
    order = flat.sum(-1).argsort()
    return model.inner(flat[order])[order.argsort()].view_as(h)


def weight_alone(model: Odd, h: torch.Tensor) -> torch.Tensor:
    return h @ model.inner.weight.T


def called_and_dropped(model: Odd, h: torch.Tensor) -> torch.Tensor:
    model.inner(h)
    return h


def changed_after(model: Odd, h: torch.Tensor) -> torch.Tensor:
    h = h * 2
    y = model.inner(h)
    h += 1
    return y


def odd_batch() -> Batch:
    x = torch.randn(N, T, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Batch({"x": x}, torch.arange(N) % 3, torch.arange(N))


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (mixed, "cannot be traced to samples"),
        (weight_alone, "no gradient reaches it"),
        (called_and_dropped, "no gradient reaches it"),
        (changed_after, "changed in place after it was read"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_measured_is_left_out_and_the_others_are_right(between, reason):
    model, batch = frozen(lambda: Odd(between)), odd_batch()
    layers = [LayerSpec(name, 4, "linear", methods=("lora",)) for name in ("outer", "inner", "head")]
    spec = ModelSpec("", 0, [*layers[:2], replace(layers[2], n_out=3)])
    measured = profile(model, spec, [batch], classification_loss, everything=False)
    assert [layer.layer for layer in measured.layers] == ["outer", "head"]
    assert reason in measured.unmeasured["inner"]
    assert reason in measured.left_out["inner.weight"]
    if between is not changed_after:  # autograd itself refuses that one where weights are trained
        assert_equal(measured, sample_gradients(model, batch, classification_loss), 1e-9)


def doubled(_: Any, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (given[0] * 2,)


def doubled_in_place(_: Any, __: Any, output: torch.Tensor) -> None:
    output.mul_(2)


@pytest.mark.parametrize(
    ("kind", "hook", "reason"),
    [
        ("pre_hook", doubled, "changes its input, which PEFT's LoRA does not get"),
        ("hook", doubled_in_place, "changes its output, to which PEFT's LoRA adds afterwards"),
        ("hook", lambda _, given, output: None, ""),
    ],
    ids=["input", "output in place", "looks on"],
)
def test_a_layer_that_a_hook_makes_another_is_left_out(kind: str, hook: Callable[..., Any], reason: str):
    """PEFT's layer stands around the layer with its hooks: its LoRA is no change of the weight any more."""
    model, batch = frozen(lambda: Odd(lambda model, h: model.inner(h))), odd_batch()
    getattr(model.inner, f"register_forward_{kind}")(hook)
    layers = [LayerSpec(name, 4, "linear", methods=("lora",)) for name in ("outer", "inner", "head")]
    spec = ModelSpec("", 0, [*layers[:2], replace(layers[2], n_out=3)])
    measured = profile(model, spec, [batch], classification_loss, everything=False)
    assert reason in measured.unmeasured.get("inner", "")
    assert ("inner" in measured.by_name()) is not bool(reason)
    assert_equal(measured, sample_gradients(model, batch, classification_loss), 1e-9)


def test_nothing_left_is_refused_with_the_reasons():
    model = frozen(lambda: Odd(mixed))
    spec = ModelSpec("", 0, [LayerSpec("inner", 4, "linear", methods=("lora",))])
    with pytest.raises(ProfilingError, match="none of the layers could be measured; inner: gets the tokens of all"):
        profile(model, spec, [odd_batch()], classification_loss, everything=False)


def test_a_layer_whose_inputs_are_summed_for_another_may_be_left_out():
    def both(model: Odd, h: torch.Tensor) -> torch.Tensor:
        model.inner(h)
        return model.outer(h)

    model, batch = frozen(lambda: Odd(both)), odd_batch()
    spec = ModelSpec("", 0, [LayerSpec(name, 4, "linear", methods=("lora",)) for name in ("inner", "outer")])
    measured = profile(model, spec, [batch], classification_loss, statistics=("factors",), everything=False)
    alone = profile(
        model, replace(spec, layers=spec.layers[1:]), [batch], classification_loss, statistics=("factors",),
        everything=False,
    )  # fmt: skip
    ours, theirs = (each.by_name()["outer"].by_method["lora"].input_factor for each in (measured, alone))
    assert list(measured.unmeasured) == ["inner"]
    assert np.array_equal(ours, theirs)
