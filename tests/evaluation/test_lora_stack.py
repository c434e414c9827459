"""Stacked arms are the same fine-tunes as single ones, and as PEFT's with torch's AdamW."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from layerlens.evaluation.stacks import Arm, LoraStack, drawn_a
from layerlens.evaluation.study_task import StudyTask, lora_layers
from layerlens.evaluation.training import HEAD_LEARNING_RATE, SCALE, data_order, train
from layerlens.tuning.short_training import schedule

# Losses of order 1 after a few steps in float32: sums over at most 32 features and 24 rows are off by some 1e-6, and
# Adam divides gradients near 0 by their own size, which can turn one such rounding into a whole step of 1e-2 of one
# weight among hundreds; 2e-4 covers that and is far below what another order of samples or another seed changes (1e-2).
TOLERANCE = 2e-4


def _arms(task: StudyTask) -> list[Arm]:
    names = [layer.name for layer in lora_layers(task)]
    return [
        Arm(dict.fromkeys(names, 2), 0, 1e-2),
        Arm({names[0]: 4, names[-1]: 1}, 1, 3e-2),
        Arm({names[3]: 1}, 0, 1e-3),
        Arm({}, 2, 1e-2),
    ]


def test_stacked_arms_equal_single_ones(task: StudyTask) -> None:
    arms = _arms(task)
    together = train(task, arms)
    for arm, stacked in zip(arms, together, strict=True):
        alone = train(task, [arm])[0]
        for name in ("validation_loss", "test_loss"):
            assert getattr(stacked, name) == pytest.approx(getattr(alone, name), abs=TOLERANCE)


def test_an_arm_equals_peft_with_adamw(task: StudyTask) -> None:
    names = [layer.name for layer in lora_layers(task)]
    ranks = {names[0]: 4, names[4]: 2, names[7]: 1}
    arm = Arm(ranks, 3, 2e-2)
    ours = train(task, [arm])[0]

    config = LoraConfig(
        r=4, lora_alpha=int(4 * SCALE), target_modules=list(ranks), lora_dropout=0.0,
        rank_pattern={f"^{name}$": rank for name, rank in ranks.items()},
        alpha_pattern={f"^{name}$": int(rank * SCALE) for name, rank in ranks.items()},
    )  # fmt: skip
    model = get_peft_model(task.model, config)
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "lora_A"):
                layer = name.removeprefix("base_model.model.")
                weight = module.lora_A["default"].weight
                weight.copy_(drawn_a(arm.seed, layer, *weight.shape))
    head = list(model.base_model.model.classifier.parameters())
    for parameter in head:
        parameter.requires_grad_(True)
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    groups = [{"params": adapters, "lr": arm.learning_rate}, {"params": head, "lr": HEAD_LEARNING_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, task.steps))
    order = data_order(len(task.train), task.steps * task.batch_size, arm.seed)
    for step in range(task.steps):
        batch = task.train.rows(order[step * task.batch_size : (step + 1) * task.batch_size])
        optimizer.zero_grad()
        task.loss(model(**batch.inputs), batch).mean().backward()
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        batch = task.test.rows(torch.arange(len(task.test)))
        theirs = float(task.loss(model(**batch.inputs), batch).mean())
    assert ours.test_loss == pytest.approx(theirs, abs=TOLERANCE)


def test_padding_of_smaller_ranks_stays_zero(task: StudyTask) -> None:
    name = lora_layers(task)[0].name
    arms = [Arm({name: 4}, 0, 1e-2), Arm({name: 1}, 0, 1e-2)]
    stack = LoraStack(task.model, arms, scale=SCALE)
    layer = stack.layers[0]
    with torch.no_grad():
        layer.b[:, :1] = 0.1  # both arms' first direction is in use
        layer.b[0] = 0.1
    with stack.attached():
        batch = task.train.rows(torch.arange(8))
        task.loss(task.model(**batch.inputs), batch).sum().backward()
    assert layer.a.grad[1, :, :1].abs().max() > 0.0
    assert not layer.a.grad[1, :, 1:].any()
    assert not layer.b.grad[1, 1:].any()


def test_the_model_is_as_before(task: StudyTask) -> None:
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    train(task, _arms(task))
    assert all(torch.equal(before[name], value) for name, value in task.model.state_dict().items())
    assert not any(module._forward_hooks for module in task.model.modules())


def test_a_layer_whose_weight_is_stored_transposed() -> None:
    """GPT-2's: [n_in, n_out]."""
    from transformers.pytorch_utils import Conv1D

    model = torch.nn.Sequential(Conv1D(12, 6))
    stack = LoraStack(model, [Arm({"0": 2}, 0, 1e-3), Arm({"0": 3}, 1, 1e-3)], scale=SCALE)
    layer = stack.layers[0]
    assert [tuple(one.shape) for one in layer.parameters()] == [(2, 6, 3), (2, 3, 12)]
    torch.nn.init.normal_(layer.b.data)
    h = torch.randn(2, 5, 6)
    with stack.attached():
        out = model(h)
    for arm in range(2):
        expected = model(h[arm]) + SCALE * h[arm] @ layer.a[arm] @ layer.b[arm]
        # Sums over at most 6 products of order 1 in float32, in another order.
        torch.testing.assert_close(out[arm], expected, rtol=1e-5, atol=1e-5)
