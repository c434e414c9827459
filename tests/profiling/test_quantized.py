"""Statistics of quantized layers equal brute force on the same quantized model: a zero is added to each weight, and
autograd says its gradient, one backward pass for each sample.

Both routes round at 2^-24 and sum some hundred products: 1e-4 relative leaves room for cancellation in the means.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from layerlens.integrations.flops import FlopCounter
from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel, weights_fingerprint
from layerlens.integrations.quantized import keep_weights, quantized_layers, weights_kept
from layerlens.integrations.quantized_loading import quantization_arguments
from layerlens.profiling.measure import measure
from layerlens.profiling.request import StatisticsRequest
from layerlens.tasks import TASKS, Batch
from layerlens.utils.progress import silent

RELATIVE = 1e-4
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
EIGHT_BITS = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
"""By default columns with outliers are multiplied apart, and a batch's are those of all its samples."""
KINDS = pytest.mark.parametrize("asked", [FOUR_BITS, EIGHT_BITS], ids=["4 bits", "8 bits"])


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with biases."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("dense")
    model.save_pretrained(folder)
    return folder


def quantized(folder: Path, asked: dict[str, Any]) -> Any:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **quantization_arguments(asked))
    return model.eval().requires_grad_(False)


def batch_of(n: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 60, (n, 9), generator=generator)
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids, torch.arange(n))


@KINDS
def test_statistics_equal_brute_force(dense: Path, asked: dict[str, Any]):
    model, batch, loss = quantized(dense, asked), batch_of(4), TASKS["causal-lm"].loss
    spec = model_spec(PretrainedModel(model, None, "", ()), "test")
    layers = quantized_layers(model)
    assert len(layers) == 14
    assert {layer.name for layer in spec.layers if "lora" in layer.methods} == set(layers)
    found = measure(
        model, spec, [batch], request=StatisticsRequest.of(("fisher", "gradient")), sequence_length=9, threads=1,
        progress=silent, loss=loss,
    )  # fmt: skip
    assert found.coverage == pytest.approx(1 - (2 * 60 * 64 + 5 * 64 + 4 * 64 + 4 * 32) / spec.total_params)
    changes = {name: torch.zeros(x.out_features, x.in_features, requires_grad=True) for name, x in layers.items()}
    for name, layer in layers.items():
        layer.register_forward_hook(
            lambda module, args, output, name=name: output + torch.nn.functional.linear(args[0], changes[name])
        )
    each: dict[str, list[np.ndarray]] = {name: [] for name in layers}
    for n in range(4):
        one = Batch({key: x[n : n + 1] for key, x in batch.inputs.items()}, batch.labels[n : n + 1], torch.tensor([n]))
        gradients = torch.autograd.grad(loss(model(**one.inputs), one).sum(), list(changes.values()))
        for name, gradient in zip(changes, gradients, strict=True):
            each[name].append(gradient.double().numpy().ravel())
    for layer in found.layers:
        if "lora" in layer.by_method:
            rows, measured = np.stack(each[layer.layer]), layer.by_method["lora"]
            assert measured.trace == pytest.approx(np.square(rows).sum(axis=1).mean(), rel=RELATIVE), layer.layer
            assert measured.energy == pytest.approx(np.square(rows.mean(axis=0)).sum(), rel=RELATIVE), layer.layer


@KINDS
def test_parameters_flops_and_memory_are_of_the_quantized_model(dense: Path, asked: dict[str, Any]):
    plain, model = LlamaForCausalLM.from_pretrained(dense).eval(), quantized(dense, asked)
    specs = [model_spec(PretrainedModel(one, None, "", ()), "test") for one in (plain, model)]
    assert specs[1].total_params == specs[0].total_params == sum(x.numel() for x in plain.parameters())
    counts = []
    for one in (plain, model):
        with FlopCounter(one) as counter, torch.no_grad():
            one(**batch_of(2).inputs)
        counts.append((counter.get_total_flops(), dict(counter.get_flop_counts()["LlamaForCausalLM.model.layers.0"])))
    assert counts[0][0] == counts[1][0]
    assert sum(counts[0][1].values()) == sum(counts[1][1].values())
    weights = sum(x.in_features * x.out_features for x in quantized_layers(model).values())
    rest = specs[0].weight_bytes - 4 * weights
    scales = specs[1].weight_bytes - rest - weights * (0.5 if asked is FOUR_BITS else 1)
    assert 0 < scales < weights  # in a tiny model tables weigh much
    saved = {name: x for name, x in model.state_dict().items() if not name.startswith("lm_head")}
    head = model.lm_head.weight.nbytes
    assert specs[1].weight_bytes == sum(x.nbytes for x in saved.values()) + head


@pytest.mark.parametrize("double", [True, False])
def test_the_fingerprint_does_not_change_as_layers_compute(dense: Path, double: bool):
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    asked = FOUR_BITS | {"bnb_4bit_use_double_quant": double, "bnb_4bit_compute_dtype": "bfloat16"}
    model = quantized(dense, asked)
    before = weights_fingerprint(model)
    assert before == weights_fingerprint(quantized(dense, asked))
    with torch.no_grad():
        model(**batch_of(1).inputs)  # biases take the precision of the product
    assert model.model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16
    assert weights_fingerprint(model) == before
    for layer in quantized_layers(model).values():  # what CPUs with AVX-512 BF16 do in their first forward pass
        layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
            layer.weight.data, layer.weight.quant_state
        )
    assert weights_fingerprint(model) == before
    other = quantized(dense, asked)
    other.model.layers[1].mlp.up_proj.weight.data[7] ^= 1
    assert weights_fingerprint(other) != before


def test_layers_are_kept_from_repacking_for_as_long_as_they_are_measured(dense: Path):
    model = quantized(dense, FOUR_BITS)
    layers = list(quantized_layers(model).values())
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    with weights_kept(model):
        assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    assert all(layer.support_avx512bf16_for_cpu for layer in layers)
    keep_weights(model)
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
