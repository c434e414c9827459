"""What the methods of PEFT keep for the backward pass, against the tensors that autograd saves."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from layerlens.config import LatencyProfile, OptimizationConfig
from layerlens.cost import cost_table
from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.models import Choice, LoraSettings
from layerlens.tuning import apply

WIDE: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48
}  # fmt: skip
BATCH, TOKENS = 2, 20
EXACT = ("ia3", "bitfit")


class Saved:
    """Holds a tensor for as long as autograd holds this."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()


def kept_bytes(model: Any) -> int:
    """Bytes that are saved for the backward pass after a forward pass, weights apart, each storage once."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    boxes: list[weakref.ref[Saved]] = []

    def pack(tensor: torch.Tensor) -> Saved:
        box = Saved(tensor)
        boxes.append(weakref.ref(box))
        return box

    model.config.use_cache = False
    handle = model.get_input_embeddings().register_forward_hook(lambda *_: _[2].requires_grad_(True))
    ids = torch.ones(BATCH, TOKENS, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        logits = model.eval()(input_ids=ids).logits.sum()
    handle.remove()
    storages = [box.tensor.untyped_storage() for ref in boxes if (box := ref()) is not None]
    assert logits.requires_grad
    return sum({one.data_ptr(): one.nbytes() for one in storages if one.data_ptr() not in own}.values())


def model_of(architecture: str) -> Any:
    torch.manual_seed(0)
    if architecture == "bert":
        model: Any = BertForSequenceClassification(BertConfig(**WIDE))
    elif architecture == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
        )
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**WIDE, num_key_value_heads=2, head_dim=8))
    return model.requires_grad_(False)


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "qwen3"])
@pytest.mark.parametrize("method", ["dora", "ia3", "bitfit", "ln_tuning"])
def test_the_prediction_is_an_upper_bound_and_where_it_can_be_exact_it_is(method: str, architecture: str):
    model = model_of(architecture)
    spec = model_spec(PretrainedModel(model, None, "", ()), "tiny", methods=[method])
    taking = [layer.name for layer in spec.layers if method in layer.methods]
    choice = Choice.of(dict.fromkeys(taking, (method, 2 if method == "dora" else 1)), lora=LoraSettings(2.0))
    if not taking:
        assert (method, architecture) == ("bitfit", "gpt2")
        return
    profile = LatencyProfile(batch_size=BATCH, sequence_length=TOKENS)
    settings = OptimizationConfig(max_trainable_params=1, methods=(method,), latency_profile=profile)
    costs = cost_table(spec, None, choice.chosen, settings).cost__ro
    predicted = 1e9 * costs[2].sum() - 16 * costs[0].sum()  # without value, gradient and two moments of AdamW
    measured = kept_bytes(apply(copy.deepcopy(model), choice)) - kept_bytes(model)
    if method in EXACT:
        assert measured == pytest.approx(predicted, abs=0.5)
    else:
        assert measured <= predicted + 0.5
        assert method == "ln_tuning" or predicted < 2 * measured


@pytest.mark.parametrize("rank", [1, 5])
def test_lora_on_an_embedding_keeps_what_is_predicted(rank: int):
    torch.manual_seed(0)
    model: Any = Qwen3ForCausalLM(Qwen3Config(**WIDE, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False))
    spec = model_spec(PretrainedModel(model.requires_grad_(False), None, "", ()), "tiny", only=["embed_tokens"])
    choice = Choice.of({"model.embed_tokens": ("lora", rank)}, lora=LoraSettings(2.0))
    profile = LatencyProfile(batch_size=BATCH, sequence_length=TOKENS)
    settings = OptimizationConfig(max_trainable_params=1, latency_profile=profile)
    params, flops, vram_gb, *_ = cost_table(spec, None, choice.chosen, settings).cost__ro[:, 0]
    tuned = apply(copy.deepcopy(model), choice)
    assert params == rank * (50 + 32) == sum(x.numel() for x in tuned.parameters() if x.requires_grad)
    ids = torch.ones(BATCH, TOKENS, dtype=torch.int64)
    with FlopCounterMode(display=False) as before:
        model(input_ids=ids)
    with FlopCounterMode(display=False) as after:
        tuned(input_ids=ids)
    assert flops == after.get_total_flops() - before.get_total_flops()
    kept = kept_bytes(tuned) - kept_bytes(model) - ids.nbytes  # the indices, which are there anyway
    assert kept == pytest.approx(1e9 * vram_gb - 16 * params, abs=0.5)
