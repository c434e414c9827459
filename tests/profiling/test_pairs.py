"""Preference pairs are measured pair by pair, against plain autograd on one pair at a time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))
from language_support import language_model, read, tokenizer

from layerlens.config import DataConfig
from layerlens.integrations.layers import model_spec
from layerlens.profiling.measure import measure
from layerlens.profiling.request import StatisticsRequest
from layerlens.tasks import TASKS, make_batches
from layerlens.utils.progress import silent

PAIRS = [
    {
        "prompt": f"is {n}{' in' * (n % 3)}?",
        "chosen": f" it is{' the' * (n % 4)}",
        "rejected": " " + "no " * (1 + n % 5),
    }
    for n in range(9)
]
LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj")


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_gradient_of_a_pair_is_one_sample(tmp_path, batch_size):
    pretrained, task = language_model(tokenizer()), TASKS["dpo"]
    config = DataConfig(source="-", max_length=40)
    batches = make_batches(task, pretrained, read(tmp_path, PAIRS), config, batch_size=batch_size)
    assert batches.n_samples == len(PAIRS)
    measured = measure(
        pretrained.model, model_spec(pretrained, "tiny"), batches, request=StatisticsRequest.of({"fisher", "gradient"}),
        sequence_length=40, threads=1, progress=silent, loss=task.loss,
    )  # fmt: skip
    weights = {name: pretrained.model.get_parameter(f"{name}.weight").requires_grad_(True) for name in LAYERS}
    singles = make_batches(task, pretrained, read(tmp_path, PAIRS), config, batch_size=1)
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name in LAYERS}
    for single in singles:
        assert single.inputs["input_ids"].shape[0] == 2
        loss = task.loss(pretrained.model(**single.inputs), single).sum()
        for name, gradient in zip(LAYERS, torch.autograd.grad(loss, list(weights.values())), strict=True):
            gradients[name].append(gradient)
    for layer in measured.layers:
        if layer.layer in LAYERS:
            found, known = layer.by_method["lora"], torch.stack(gradients[layer.layer])
            assert found.trace == pytest.approx(float(known.square().sum(dim=(1, 2)).mean()), rel=1e-4)
            assert found.energy == pytest.approx(float(known.mean(dim=0).square().sum()), rel=1e-4)
    assert measured.n_samples == len(PAIRS)
    tokens = sum(int(single.mask.sum()) for single in singles)
    assert measured.n_tokens == tokens
    assert measured.mean_loss == pytest.approx(0.693147, abs=1e-5)  # the reference is the model itself
