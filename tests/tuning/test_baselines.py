"""Every baseline: starts at the base model's logits, trains what it reports, ends within its budget and on disk."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from layerlens.config import TrainingConfig
from layerlens.exceptions import ConfigurationError
from layerlens.models import LayerSpec, ModelFacts
from layerlens.rank_rules.published import proportional_ranks
from layerlens.tuning import load, save
from layerlens.tuning.baselines import BASELINES, BaselineRequest, known_baseline
from layerlens.tuning.baselines.autolora import PERTURBATION, hypergradient, ranks_within
from layerlens.tuning.baselines.plain import trained_params
from layerlens.tuning.checkpoints import last_checkpoint
from layerlens.tuning.fine_tune import TrainingHook
from layerlens.tuning.samples import TrainingData
from layerlens.tuning.training import fine_tune

BUDGET = 2600
HEADLESS = ("full", "head-only")
OVER_BUDGET_WHILE_TRAINING = ("full", "adalora", "truncation", "hypernetwork")
# AdaLoRA's budget is a number of ranks; see its docstring.
EXACT = tuple(name for name in BASELINES if name not in ("full", "adalora"))


def samples(n: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, 50, (6 + index % 5,), generator=generator) for index in range(n)]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 3} for row in rows]


DATA = TrainingData(samples(24), samples(8, seed=1), fingerprint="f")
CONFIG = TrainingConfig(epochs=2, batch_size=4, learning_rate=1e-2)
STEPS = 12


@pytest.fixture
def request_for(tiny):
    def make(architecture="bert", **changes: Any) -> tuple[Any, BaselineRequest]:
        base = tiny(architecture)
        head = "classifier" if architecture == "bert" else "score"
        facts = ModelFacts(task="sequence-classification", head_modules=(head,), name_or_path=base.spec.model_name)
        batches = [DATA.collate(DATA.train[start : start + 4]) for start in range(0, 24, 4)]
        request = BaselineRequest(
            base.model, base.spec, facts, BUDGET, batches, total_steps=STEPS, seed=3, learning_rate=1e-2
        )
        return base, dataclasses.replace(request, **changes)

    return make


def train(prepared, tmp_path, **more):
    return fine_tune(
        prepared.model, DATA, CONFIG, task="sequence-classification", checkpoints=tmp_path, hooks=prepared.hooks, **more
    )


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@pytest.mark.parametrize("name", tuple(BASELINES))
def test_a_baseline_starts_trains_ends_and_comes_back(request_for, tiny, tmp_path, name, architecture):
    base, request = request_for(architecture)
    before = base.logits()
    weights = {key: value.clone() for key, value in base.model.state_dict().items()}
    prepared = BASELINES[name].prepare(request)
    assert (base.logits(prepared.model.eval()) - before).abs().max() == 0.0
    assert prepared.trained_params == trained_params(prepared.model, request.facts)
    if name not in OVER_BUDGET_WHILE_TRAINING:
        assert prepared.trained_params <= BUDGET
    if prepared.choice is not None and name != "hypernetwork":
        assert prepared.trained_params == prepared.choice.trainable_params(request.spec)

    result = train(prepared, tmp_path / "checkpoints")
    head = sum(value.numel() for key, value in weights.items() if key.startswith(request.facts.heads[0]))
    assert result.trained_parameters == prepared.trained_params + head
    finished = prepared.finish(prepared.model)
    assert (base.logits(finished.model.eval()) - before).abs().max() > 1e-4
    if finished.choice is not None:
        assert finished.kept_params == finished.choice.trainable_params(request.spec)
        assert finished.kept_params == trained_params(finished.model, request.facts)
    if name in EXACT and name not in HEADLESS:
        # Uniform sizes can leave up to one more size of every layer unused, all others less than one rank of a layer.
        assert 0 < finished.kept_params <= BUDGET
    if name in ("gora", "random", "autolora"):
        assert finished.kept_params > BUDGET - max(layer.n_in + layer.n_out for layer in request.spec.layers)

    expected = base.logits(finished.model)
    save(finished.model, tmp_path / "saved")
    fresh = tiny(architecture)
    loaded = load(fresh.model, tmp_path / "saved")
    assert (fresh.logits(loaded.eval()) - expected).abs().max() == 0.0
    if name != "full":
        own = fresh.parameters()
        for key, value in weights.items():  # the base model's own weights have not moved
            near = [
                own[candidate] for candidate in (key, key.replace(".weight", ".base_layer.weight")) if candidate in own
            ]
            assert not near or key.startswith(request.facts.heads[0]) or torch.equal(near[0], value), key


@pytest.mark.parametrize("name", ["adalora", "truncation"])
def test_converting_to_lora_keeps_what_was_learned(request_for, tmp_path, name):
    base, request = request_for()
    prepared = BASELINES[name].prepare(dataclasses.replace(request, budget=BUDGET if name == "adalora" else 8 * BUDGET))
    train(prepared, tmp_path)
    before = base.logits(prepared.model.eval())
    finished = prepared.finish(prepared.model)
    if name == "adalora":
        # A·E and B of the same numbers in another order of products: float32 rounding through two blocks.
        torch.testing.assert_close(base.logits(finished.model), before, rtol=1e-4, atol=1e-4)
    else:
        difference = (base.logits(finished.model) - before).abs().max()
        assert 0 < difference < 0.5 * before.abs().max()


def test_adalora_s_allocator_is_called_every_step_and_cuts(request_for, tmp_path, monkeypatch):
    from peft.tuners.adalora import AdaLoraModel

    calls = []
    real = AdaLoraModel.update_and_allocate

    def watched(self, step):
        gradients = [value.grad for name, value in self.named_parameters() if "lora_E" in name]
        calls.append((step, all(gradient is not None for gradient in gradients)))
        return real(self, step)

    monkeypatch.setattr(AdaLoraModel, "update_and_allocate", watched)
    _, request = request_for()
    prepared = BASELINES["adalora"].prepare(request)
    train(prepared, tmp_path)
    assert calls == [(step, True) for step in range(1, STEPS + 1)]
    finished = prepared.finish(prepared.model)
    layers = [layer for layer in request.spec.layers if "lora" in layer.methods]
    ranks = [row.rank for row in finished.choice.options]
    assert sum(ranks) == BUDGET * len(layers) // sum(layer.n_in + layer.n_out for layer in layers)
    assert len(set(ranks)) > 1


def test_an_interrupted_adalora_goes_on_to_the_same_bits(request_for, tmp_path):
    class Kill(TrainingHook):
        def after_step(self, model, step):
            if step == 8:
                raise KeyboardInterrupt

    states = []
    for killed in (False, True):
        _, request = request_for()
        prepared = BASELINES["adalora"].prepare(request)
        if killed:
            with pytest.raises(KeyboardInterrupt):
                fine_tune(
                    prepared.model, DATA, CONFIG, task="sequence-classification", checkpoints=tmp_path / "b",
                    hooks=(*prepared.hooks, Kill()),
                )  # fmt: skip
            assert last_checkpoint(tmp_path / "b") is not None
            _, request = request_for()
            prepared = BASELINES["adalora"].prepare(request)
            hooks = (*prepared.hooks, TrainingHook())
            fine_tune(
                prepared.model, DATA, CONFIG, task="sequence-classification", checkpoints=tmp_path / "b", hooks=hooks
            )
        else:
            train(prepared, tmp_path / "a")
        states.append({name: value.clone() for name, value in prepared.model.state_dict().items()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_eva_s_ranks_are_peft_s_own(request_for):
    from peft import EvaConfig, LoraConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    _, request = request_for()
    prepared = BASELINES["eva"].prepare(request)
    chosen = {row.layer: row.rank for row in prepared.choice.options if row.rank}
    assert len(set(chosen.values())) > 1
    for rank in (3, 2, 1):  # the largest uniform rank whose redistribution stays within the budget
        _, again = request_for()
        config = LoraConfig(
            r=rank, target_modules=[layer.name for layer in again.spec.layers if "lora" in layer.methods],
            init_lora_weights="eva", eva_config=EvaConfig(rho=2.0, use_label_mask=False),
        )  # fmt: skip
        torch.manual_seed(request.seed)
        found = get_eva_state_dict(again.model, again.batches, config, show_progress_bar=False)
        ranks = {name: len(rows) for name, rows in found.items() if len(rows)}
        if ranks == chosen:
            break
    assert ranks == chosen
    layers = dict(prepared.model.get_base_model().named_modules())
    for name, rows in found.items():
        if len(rows):
            torch.testing.assert_close(layers[name].lora_A["default"].weight.detach(), rows.float())


def test_the_hypergradient_is_the_derivative_through_one_step():
    """A toy whose exact answer is known by autograd through the step; the error of the differences falls with ε²."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(3, dtype=torch.float64))
    alpha = torch.nn.Parameter(torch.randn(3, dtype=torch.float64))

    def loss(model, batch):
        return ((weight * alpha.softmax(0) * batch["x"]).sum().sin() - batch["y"]) ** 2

    training = {"x": torch.randn(3, dtype=torch.float64), "y": 0.3}
    judging = {"x": torch.randn(3, dtype=torch.float64), "y": -0.2}
    rate = 0.1
    request = BaselineRequest(None, None, {}, 0, learning_rate=rate, loss=loss)
    start = weight.detach().clone()
    got = hypergradient(None, [weight], [alpha], training, judging, request)[0]
    torch.testing.assert_close(weight.detach(), start, rtol=0, atol=1e-15)

    (step,) = torch.autograd.grad(loss(None, training), [weight], create_graph=True)
    moved = weight - rate * step
    judged = ((moved * alpha.softmax(0) * judging["x"]).sum().sin() - judging["y"]) ** 2
    (exact,) = torch.autograd.grad(judged, [alpha])
    plain = hypergradient(None, [weight], [alpha], training, judging, dataclasses.replace(request, learning_rate=0.0))
    assert (exact - plain[0]).abs().max() > 1e-3  # else the second-order part would not be tested
    # Third derivatives of this loss are of order 10: rate·10·ε² relative to the parts' size, ε ≤ 0.01 / norm.
    assert (got - exact).abs().max() < rate * 10 * PERTURBATION
    assert (got - exact).abs().max() < 0.02 * (exact - plain[0]).abs().max()


def test_parts_with_the_largest_selection_variables_are_kept():
    layers = [LayerSpec("a", 4, n_in=4, n_out=6), LayerSpec("b", 4, n_in=2, n_out=3)]
    selection = {"a": torch.tensor([0.5, 2.0, 1.2]), "b": torch.tensor([0.9, 1.5, 0.1])}
    assert ranks_within(layers, selection, 10) == {"a": 1}
    assert ranks_within(layers, selection, 16) == {"a": 1, "b": 1}
    assert ranks_within(layers, selection, 30) == {"a": 2, "b": 2}
    assert ranks_within(layers, selection, 4) == {}


def test_ranks_follow_their_weights_up_to_the_budget():
    layers = [LayerSpec(name, 8, n_in=8, n_out=8) for name in "abc"]
    assert proportional_ranks(layers, {"a": 1.0, "b": 2.0, "c": 0.0}, 16 * 6) == {"a": 2, "b": 4}
    assert proportional_ranks(layers, {"a": 1.0, "b": 1.0, "c": 1.0}, 16 * 5) == {"a": 2, "b": 2, "c": 1}
    assert proportional_ranks(layers, {"a": 1.0, "b": 9.0, "c": 1.0}, 16 * 90) == {"a": 8, "b": 8, "c": 8}
    assert proportional_ranks(layers, {"a": 1.0, "b": 9.0, "c": 0.0}, 16 * 7, least=1, most=3) == {
        "a": 3, "b": 3, "c": 1,
    }  # fmt: skip
    with pytest.raises(ConfigurationError, match="rank 2 on 3 layers trains 96 parameters, more than the budget of 50"):
        proportional_ranks(layers, {"a": 1.0, "b": 9.0, "c": 0.0}, 50, least=2)


def test_refusals(request_for):
    with pytest.raises(ConfigurationError, match=r"'adalor' is not known, did you mean 'adalora'.*known: full, head"):
        known_baseline("adalor")
    for name, changes, message in (
        ("uniform-lora", {"budget": 10}, "of size 1 on .* layers trains .*; give at least"),
        ("adapter-only", {"budget": 10}, "adapter of size 1"),
        ("adalora", {"total_steps": 2}, "needs at least 4 optimiser steps"),
        ("eva", {"batches": ()}, "needs training batches"),
        ("gora", {"batches": ()}, "needs training batches"),
        ("autolora", {"batches": ()}, "at least two training batches"),
        ("head-only", {"facts": ModelFacts()}, "no new task head"),
    ):
        _, request = request_for(**changes)
        with pytest.raises(ConfigurationError, match=message):
            known_baseline(name).prepare(request)
