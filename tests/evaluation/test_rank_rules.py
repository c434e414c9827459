"""Every rank rule keeps the budget, and does what its paper says on small cases."""

from __future__ import annotations

import pytest
import torch

from layerlens.evaluation.stacks import AdaLora, Arm, LoraStack
from layerlens.evaluation.study import allocate, utilities
from layerlens.evaluation.study_task import (
    LayerGradient,
    StudyTask,
    eva_inits,
    gradient_svd_inits,
    layer_gradients,
    lora_layers,
    profile,
)
from layerlens.evaluation.training import train
from layerlens.models import LayerSpec
from layerlens.rank_rules import params_of, rank_cost
from layerlens.rank_rules.adalora import Schedule
from layerlens.rank_rules.published import proportional_ranks, redistributed
from layerlens.registry import RANK_RULES
from layerlens.tuning.baselines.measured import quantity


def _layer(name: str, n_in: int, n_out: int, role: str = "") -> LayerSpec:
    return LayerSpec(name=name, hidden_size=4, layer_type="linear", n_in=n_in, n_out=n_out, role=role)


LAYERS = [_layer("a", 4, 4, "query"), _layer("b", 4, 8), _layer("c", 8, 4, "value")]  # 8, 12 and 12 parameters a rank


def test_uniform_gives_equal_ranks_and_spreads_the_rest() -> None:
    uniform, query_value = RANK_RULES["uniform"].choose, RANK_RULES["uniform_qv"].choose
    assert uniform(LAYERS, 64, {}, 0) == {"a": 2, "b": 2, "c": 2}
    assert uniform(LAYERS, 63, {}, 0) == {"a": 2, "b": 1, "c": 2}  # the solver's order: first, last, then between them
    assert uniform(LAYERS, 20, {}, 0) == {"a": 1, "c": 1}
    assert query_value(LAYERS, 40, {}, 0) == {"a": 2, "c": 2}


def test_proportional_ranks_follow_the_score() -> None:
    assert proportional_ranks(LAYERS, {"a": 1.0, "b": 1.0, "c": 2.0}, 44) == {"a": 1, "b": 1, "c": 2}


@pytest.mark.parametrize("budget", [7, 8, 31, 32, 100, 1000])
def test_no_rule_exceeds_the_budget(budget: int) -> None:
    generator = torch.Generator().manual_seed(budget)
    measured = {}
    for layer in LAYERS:
        inputs = torch.randn(20, layer.n_in, generator=generator)
        gradient, weight = torch.randn(2, layer.n_out, layer.n_in, generator=generator)
        measured[layer.name] = LayerGradient(gradient, weight, inputs.mT @ inputs / 20)
    score = {"a": 0.3, "b": 0.0, "c": 5.0}
    quantities = {"gradient_norm": score, "fisher_trace": score} | {
        need: {name: quantity(need, x.weight, x.gradient, x.input_covariance) for name, x in measured.items()}
        for need in ("weight_gradient", "explained_variance")
    }
    for rule in RANK_RULES.values():
        ranks = rule.choose(LAYERS, budget, quantities, 0)
        assert params_of(LAYERS, ranks) <= budget
        assert all(rank >= 1 for rank in ranks.values())
    assert "b" not in proportional_ranks(LAYERS, score, 31)


def test_eva_follows_explained_variance() -> None:
    concentrated, flat = torch.diag(torch.tensor([97.0, 1.0, 1.0, 1.0])), torch.eye(4)
    layers = [_layer("concentrated", 4, 4), _layer("flat", 4, 4)]
    nothing = torch.zeros(4, 4)
    measured = {
        "concentrated": LayerGradient(nothing, nothing, concentrated),
        "flat": LayerGradient(nothing, nothing, flat),
    }
    # Ratios: 0.97 and then 0.01 on one layer, 0.25 each on the other; a layer can have twice the mean rank.
    shares = {name: quantity("explained_variance", nothing, None, x.input_covariance) for name, x in measured.items()}
    assert RANK_RULES["eva"].choose(layers, 24, {"explained_variance": shares}, 0) == {"concentrated": 1, "flat": 2}
    initial = eva_inits(measured, {"concentrated": 1})["concentrated"]
    assert torch.allclose(initial.abs(), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))


def test_gradient_svd_begins_along_the_mean_gradient() -> None:
    direction = torch.tensor([3.0, 0.0, 4.0, 0.0]) / 5.0
    gradient = torch.outer(torch.tensor([1.0, 2.0, 0.0]), direction) + 1e-3 * torch.eye(3, 4)
    measured = {"a": LayerGradient(gradient, torch.zeros(3, 4), torch.eye(4))}
    initial = gradient_svd_inits(measured, {"a": 2})["a"]
    torch.testing.assert_close(initial @ initial.mT, torch.eye(2), atol=1e-6, rtol=0)
    assert abs(float(initial[0] @ direction)) > 0.999  # the perturbation of 1e-3 turns it by about as much


def test_mean_gradients_are_those_of_autograd(task: StudyTask) -> None:
    index = torch.arange(8)
    measured = layer_gradients(task, task.train.batches(index, 3))
    name = lora_layers(task)[2].name
    weight = task.model.get_submodule(name).weight
    weight.requires_grad_(True)
    batch = task.train.rows(index)
    task.loss(task.model(**batch.inputs), batch).mean().backward()
    # Sums of 48 float32 terms in another order: relative 48 · 2^-24.
    torch.testing.assert_close(measured[name].gradient, weight.grad, rtol=1e-4, atol=1e-7)
    weight.grad = None
    weight.requires_grad_(False)


def test_adalora_ends_within_its_budget(task: StudyTask) -> None:
    layers = lora_layers(task)
    budget = sum(rank_cost(layer) for layer in layers)
    kept: list[int] = []

    class Watched(AdaLora):
        def after_step(self, layers, step, steps):  # type: ignore[no-untyped-def]
            super().after_step(layers, step, steps)
            kept.append(int(sum(layer.cost * layer.mask[0].sum() for layer in layers)))

    arms = [Arm({layer.name: 2 for layer in layers}, seed, 1e-2) for seed in (0, 1)]
    train(task, arms, steps=20, layer_stack=Watched(budget))
    assert kept[0] == 2 * budget
    assert budget - max(rank_cost(layer) for layer in layers) < kept[-1] <= budget


def test_adalora_changes_nothing_at_first(task: StudyTask) -> None:
    batch = task.train.rows(torch.arange(4))
    before = task.model(**batch.inputs).logits
    arm = Arm({layer.name: 2 for layer in lora_layers(task)}, 0, 1e-2)
    stack = LoraStack(task.model, [arm], scale=2.0, layer_stack=AdaLora(10))
    with stack.attached():
        assert torch.equal(task.model(**batch.inputs).logits, before)


@pytest.mark.parametrize("model", ["signal", "whitened", "gradient", "uniform", "weighted"])
def test_product_utilities_allocate_within_the_budget(task: StudyTask, model: str) -> None:
    statistics = profile(task).statistics
    layers = lora_layers(task)
    budget = sum(rank_cost(layer) for layer in layers) // 2
    ranks = allocate(task, statistics, utilities(task, statistics, model), budget)
    assert 0 < params_of(layers, ranks) <= budget


def test_eva_s_ranks_are_peft_s_where_its_decomposition_is_exact() -> None:
    """One batch again and again: the incremental decomposition is the one of the covariance."""
    from peft import EvaConfig, LoraConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)).requires_grad_(False)
    h = torch.randn(300, 6) * torch.tensor([5.0, 2.0, 1.0, 0.5, 0.3, 0.2])
    inner = model[:2](h)
    layers = [_layer("0", 6, 8), _layer("2", 8, 4)]
    covariances = {"0": torch.cov(h.T), "2": torch.cov(inner.T)}
    shares = {name: quantity("explained_variance", h, None, value) for name, value in covariances.items()}
    for rank in (1, 2, 3):
        config = LoraConfig(r=rank, target_modules=["0", "2"], init_lora_weights="eva", eva_config=EvaConfig(rho=2.0))
        found = get_eva_state_dict(
            model, [h], config, forward_fn=lambda model, inputs: model(inputs), prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None, show_progress_bar=False,
        )  # fmt: skip
        ranks = {name.removeprefix("base_model.model."): len(rows) for name, rows in found.items() if len(rows)}
        assert redistributed(layers, {"explained_variance": shares}, 2 * rank) == ranks


@pytest.mark.parametrize("steps", [4, 20, 80, 1000])
def test_adalora_s_schedule_is_peft_s(steps: int) -> None:
    from types import SimpleNamespace

    from peft.tuners.adalora.layer import RankAllocator

    law = Schedule(steps)
    theirs = SimpleNamespace(
        peft_config=SimpleNamespace(tinit=law.warmup, tfinal=law.final, total_step=steps, deltaT=law.interval),
        init_bgt=3000, target_bgt=2000,
    )  # fmt: skip
    for step in range(1, steps + 1):
        budget, cut = RankAllocator.budget_schedule(theirs, step)
        share = law.share(step)
        # Where its ramp ends PEFT's model cuts whatever the interval says (AdaLoraModel.update_and_allocate).
        assert (share is not None) == (cut or step == steps - law.final)
        if share is not None:
            assert int(1000 * share + 2000) == budget
