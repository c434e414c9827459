"""What is measured for DoRA, IA3, BitFit and LN tuning: gradients in their own parameters.

The other route goes through real PEFT: its parameters at the start, and what autograd leaves in their ``.grad``. Models
are float64; 1e-9 relative leaves four decimal digits for the rounding of a few thousand products at 2^-53.
"""

from __future__ import annotations

import copy
from typing import Any

import brute_force
import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.models import Choice, LoraSettings, MethodStatistics
from layerlens.registry import METHODS
from layerlens.tasks.batches import Batch
from layerlens.tuning import apply
from layerlens.utility.signal import GRADIENT
from layerlens.utility.whitened import MODEL as WHITENED

FAMILIES = ("dora", "ia3", "bitfit", "ln_tuning")
WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
COMMON: dict[str, Any] = {"vocab_size": 50, "num_labels": 3, "initializer_range": 0.3, "pad_token_id": 0}
SAMPLES = 7


def build(architecture: str) -> Any:
    torch.manual_seed(3)
    if architecture == "bert":
        model: Any = BertForSequenceClassification(BertConfig(**WIDE, **COMMON))
    elif architecture == "gpt2":
        model = GPT2ForSequenceClassification(GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=32, **COMMON))
    else:
        config = Qwen3Config(**WIDE, num_key_value_heads=2, head_dim=4, **COMMON)
        model = Qwen3ForSequenceClassification(config)
    for parameter in model.parameters():  # norms and biases that are not 1 and 0
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    return model.double().eval()


def loss(output: Any, batch: Batch) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(output.logits, batch.labels, reduction="none")


def padded_batch() -> Batch:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 50, (SAMPLES, 6), generator=generator)
    mask = torch.ones_like(ids)
    for row in (1, 4):
        ids[row, 4:], mask[row, 4:] = 0, 0
    labels = torch.randint(0, 3, (SAMPLES,), generator=generator)
    return Batch({"input_ids": ids, "attention_mask": mask}, labels, torch.arange(SAMPLES))


def choice_of(spec: Any, method: str) -> Choice:
    taking = [layer.name for layer in spec.layers if method in layer.methods]
    return Choice.of(
        dict.fromkeys(taking, (method, 2 if "ora" in method else 1)), lora=LoraSettings(2.0, False, "default")
    )


def gradients_in_peft(model: Any, choice: Choice, batch: Batch) -> dict[str, np.ndarray]:
    """Trained parameter of real PEFT -> its gradient of each sample."""
    tuned = apply(copy.deepcopy(model), choice).double().eval()
    names = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    return {name: rows for name, rows in brute_force.sample_gradients(tuned, batch, loss).items() if name in names}


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "qwen3"])
@pytest.mark.parametrize("method", FAMILIES)
def test_statistics_equal_gradients_of_pefts_own_parameters(method: str, architecture: str):
    model, batch = build(architecture), padded_batch()
    spec = model_spec(PretrainedModel(model, None, "", ()), "tiny", methods=[method])
    choice = choice_of(spec, method)
    if not choice.chosen:
        assert (method, architecture) == ("bitfit", "gpt2")  # Conv1D, which PEFT's BEFT does not take
        return
    statistics = brute_force.profile(model, spec, brute_force.pieces(batch, 4, 3), loss, everything=False).by_name()
    found = gradients_in_peft(model, choice, batch)
    for option in choice.chosen:
        mine = [rows for name, rows in found.items() if f".{option.layer}." in name and "lora_A" not in name]
        if method == "dora":
            mine = [rows for name, rows in found.items() if f".{option.layer}.lora_magnitude" in name]
        rows = np.concatenate(mine, axis=1)
        mean = rows.mean(axis=0)
        energy, trace = float(mean @ mean), float((rows**2).sum(axis=1).mean())
        measured = statistics[option.layer].by_method[method]
        # PEFT keeps magnitudes and factors in float32 until .double(): 2^-24 relative at most in what they divide.
        limit = 1e-6 if method == "dora" else 1e-9
        # A softmax does not see what all keys share: the bias of BERT's keys has a gradient of rounding errors, 1e-16.
        assert measured.energy == pytest.approx(energy, rel=limit, abs=1e-30)
        assert measured.trace == pytest.approx(trace, rel=limit, abs=1e-30)
        assert measured.signal == pytest.approx(
            energy - (trace - energy) / (SAMPLES - 1), rel=limit, abs=limit * trace + 1e-30
        )


def test_b_of_dora_has_loras_gradient_and_its_energy_is_the_sum_of_both_in_one_unit():
    model, batch = build("bert"), padded_batch()
    spec = model_spec(PretrainedModel(model, None, "", ()), "tiny", methods=["dora"])
    dora = gradients_in_peft(model, choice_of(spec, "dora"), batch)
    lora = gradients_in_peft(model, choice_of(spec, "lora"), batch)
    of_b = [name for name in lora if "lora_B" in name]
    assert of_b
    for name in of_b:
        np.testing.assert_allclose(dora[name], lora[name], rtol=1e-6, atol=1e-12)
    layer = next(layer for layer in spec.layers if "dora" in layer.methods)
    measured = {"lora": MethodStatistics(energy=5.0), "dora": MethodStatistics(energy=0.25)}
    # ‖∂L/∂B‖² = rank · 5 · (alpha/r)²/(3 n_in) on average, ‖∂L/∂m‖² = 0.25; in units of the first's factor, by rank
    factor = 2.0**2 / (3 * layer.n_in)
    for rank in (1, 2, 8):
        assert METHODS["dora"].energy(layer, rank, measured, "energy") * rank * factor == pytest.approx(
            rank * 5.0 * factor + 0.25
        )


def test_the_average_over_first_factors_is_loras_energy():
    """E‖M Aᵀ‖² = rank · ‖M‖² · Var A, over 400 draws of A: the standard error is some 2 %."""
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(6, 10, generator=generator)
    draws = [torch.empty(3, 10).uniform_(-(10**-0.5), 10**-0.5, generator=generator) for _ in range(400)]
    mean = sum(float((m @ a.T).square().sum()) for a in draws) / len(draws)
    assert mean == pytest.approx(3 * float(m.square().sum()) / (3 * 10), rel=0.1)


@pytest.mark.parametrize("method", FAMILIES)
def test_utilities_are_those_of_its_own_gradient(method: str):
    model, batch = build("bert"), padded_batch()
    spec = model_spec(PretrainedModel(model, None, "", ()), "tiny", methods=[method])
    statistics = brute_force.profile(
        model, spec, [batch], loss, everything=False,
        statistics=("gradient", "fisher", "input_scale", "whitened_spectrum"),
    )  # fmt: skip
    options = choice_of(spec, method).chosen
    utility = GRADIENT.table(spec, statistics, options, {}).utility
    by_layer, layers = statistics.by_name(), {layer.name: layer for layer in spec.layers}
    for option, value in zip(options, utility, strict=True):
        measured = by_layer[option.layer].by_method
        expected = measured[method].energy
        if method == "dora":
            expected = (
                option.rank * measured["lora"].energy + measured["dora"].energy * 0.75 * layers[option.layer].n_in
            )
        assert value == pytest.approx(np.sqrt(expected))
    whitened = WHITENED.table(spec, statistics, options, {}).utility
    for option, value in zip(options, whitened, strict=True):
        measured = by_layer[option.layer].by_method
        values = [*measured[method].spectrum[:1], *(measured["lora"].spectrum[:2] if method == "dora" else ())]
        assert value == pytest.approx(0.5 * sum(max(0.0, one) for one in values))
