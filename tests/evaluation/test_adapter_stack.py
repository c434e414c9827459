"""Stacked adapters are the product's own adapters."""

from __future__ import annotations

import pytest
import torch
from other_stacks import AdapterStack, Mixed

from layerlens.evaluation.stacks import Arm, LayerStack, LoraStack
from layerlens.evaluation.study_task import StudyTask, lora_layers
from layerlens.evaluation.training import train
from layerlens.methods.adapter_module import BottleneckAdapter


def test_a_stacked_adapter_is_the_products() -> None:
    module, arms = torch.nn.Linear(5, 6), [Arm({"x": 3}, seed, 0.1) for seed in (0, 1)]
    stack = AdapterStack("x", module, arms, 3)
    assert not torch.equal(stack.down[0], stack.down[1])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (stack.up, stack.b, stack.c):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    y = torch.randn(8, 4, 6, generator=generator)  # two arms with four samples of four tokens
    found = stack.add_to(y, torch.zeros(8, 4, 5), 2.0).detach()
    for arm, rows in enumerate((y[:4], y[4:])):
        adapter = BottleneckAdapter(6, 3, 0)
        with torch.no_grad():
            adapter.down_weight.copy_(stack.down[arm].T)
            adapter.down_bias.copy_(stack.b[arm, 0])
            adapter.up_weight.copy_(stack.up[arm].T)
            adapter.up_bias.copy_(stack.c[arm, 0])
        # float32 sums of at most six terms of order 1, in another order
        torch.testing.assert_close(found[4 * arm : 4 * arm + 4], adapter(rows).detach(), atol=1e-5, rtol=1e-5)


def test_adapters_and_lora_train_together(task: StudyTask) -> None:
    names = [layer.name for layer in lora_layers(task)]
    mixed = Mixed({names[3]: 2})
    arms = [Arm({names[3]: 2, names[0]: 1}, seed, 3e-2) for seed in (0, 1)]
    stack = LoraStack(task.model, arms, scale=2.0, layer_stack=mixed)
    assert {layer.name: type(layer) for layer in stack.layers} == {names[0]: LayerStack, names[3]: AdapterStack}
    batch = task.train.rows(torch.arange(4))
    before = task.model(**batch.inputs).logits
    with stack.attached():
        assert torch.equal(task.model(**task.train.rows(torch.arange(4).repeat(2)).inputs).logits[:4], before)
    together, plain = train(task, arms, layer_stack=mixed), train(task, arms)
    for seed, run in enumerate(together):
        alone = train(task, [arms[seed]], layer_stack=mixed)[0]
        assert run.test_loss == pytest.approx(alone.test_loss, abs=2e-4)  # as in test_lora_stack
        assert run.test_loss != plain[seed].test_loss
