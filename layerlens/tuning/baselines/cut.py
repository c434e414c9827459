"""Baselines that train more ranks than the budget buys and cut: AdaLoRA while it trains, truncation afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ConfigurationError
from layerlens.integrations.peft import BASE_PREFIX, base_of, target_modules, task_type
from layerlens.integrations.peft_calls import take_keywords
from layerlens.models import LORA, Choice
from layerlens.rank_rules.adalora import ORTHOGONALITY, SMOOTHING, Schedule, final_ranks, first_rank
from layerlens.tuning.baselines.baseline import Baseline, BaselineRequest, Finished, Prepared
from layerlens.tuning.baselines.plain import layers_with, plan, planned, trained_params, uniform_size
from layerlens.tuning.fine_tune import TrainingHook
from layerlens.tuning.inject import apply, note_before, unapply

if TYPE_CHECKING:
    import torch

LEAST_STEPS = 4
WIDER = 2


def as_lora(
    request: BaselineRequest,
    model: torch.nn.Module,
    choice: Choice,
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> Finished:
    """A model with the LoRA of ``choice``, A and B from ``factors``, and the task head as ``model`` has trained it.

    Args:
        request: says which modules are the head.
        model: the trained model; it is taken apart.
        choice: ranks and scale.
        factors: A [r, n_in] and B [n_out, r] of every LoRA layer.
    """
    import torch

    copies = {name: (a.detach().clone(), b.detach().clone()) for name, (a, b) in factors.items()}
    heads = request.facts.heads
    trained = {name: _head(model, name).state_dict() for name in heads}
    states = {name: {key: value.clone() for key, value in state.items()} for name, state in trained.items()}
    tuned = apply(unapply(model), choice, facts=request.facts)
    layers = dict(base_of(tuned).named_modules())
    with torch.no_grad():
        for name, (a, b) in copies.items():
            for part, tensor in (("lora_A", a), ("lora_B", b)):
                weight = getattr(layers[name], part)["default"].weight
                weight.copy_(tensor.reshape(weight.shape))
    for name in heads:
        _head(tuned, name).load_state_dict(states[name])
    return Finished(tuned, choice.trainable_params(request.spec), choice)


def _head(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """The module that is trained under this name: PEFT's copy where there is one."""
    module = base_of(model).get_submodule(name)
    copies = getattr(module, "modules_to_save", None)
    trained: torch.nn.Module = module if copies is None else copies["default"]
    return trained


class Allocator(TrainingHook):
    """Calls PEFT's update_and_allocate after every optimiser step, while the gradients are still there."""

    def after_step(self, model: Any, step: int) -> None:
        """Update importances, and mask what the budget of this step does not allow."""
        self._tuner(model).update_and_allocate(step)

    def before_training(self, model: Any, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        """Remember the tuner, whose averages are part of the checkpoint."""
        self.tuner = self._tuner(model)
        if getattr(self, "loaded", None):
            allocator = self.tuner.rankallocator
            allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc = self.loaded["importance"]
            self.tuner.peft_config["default"].rank_pattern = self.loaded["rank_pattern"]

    def settled(self, step: int) -> bool:
        """Not before the last cut: earlier weights have more ranks than the budget buys."""
        config = self.tuner.peft_config["default"]
        return bool(step >= config.total_step - config.tfinal)

    def state_dict(self) -> dict[str, Any]:
        """Importance averages and the ranks so far."""
        allocator = self.tuner.rankallocator
        return {
            "importance": [allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc],
            "rank_pattern": self.tuner.peft_config["default"].rank_pattern,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Kept until training begins, when the model is known."""
        self.loaded = state

    @staticmethod
    def _tuner(model: Any) -> Any:
        return model.base_model


def adalora(request: BaselineRequest) -> Prepared:
    """Starts with 1.5 times the ranks that the budget buys on average and ends with those.

    AdaLoRA's budget is a number of ranks: how many parameters are kept depends on which layers keep them. They are
    counted when training is done, and the result becomes ordinary LoRA. PEFT sets the number of ranks to a whole
    number for each layer; it is set to what the budget buys instead.

    Raises:
        ConfigurationError: there are too few steps for its schedule.
    """
    import torch
    from peft import AdaLoraConfig, get_peft_model

    if request.total_steps < LEAST_STEPS:
        raise ConfigurationError(
            f"baseline adalora: needs at least {LEAST_STEPS} optimiser steps, got {request.total_steps}"
        )
    layers = layers_with(request, LORA, dense=True)
    target = uniform_size(layers, LORA, request.budget)
    ranks = final_ranks(layers, request.budget)
    start = first_rank(layers, ranks)
    law = Schedule(request.total_steps)
    config = AdaLoraConfig(
        task_type=task_type(request.facts.task),
        modules_to_save=list(request.facts.heads) or None,
        target_modules=target_modules(request.model, [layer.name for layer in layers]),
        init_r=start,
        target_r=target,
        lora_alpha=request.alpha_over_r * start,  # PEFT declares int and takes any number
        tinit=law.warmup,
        tfinal=law.final,
        deltaT=law.interval,
        total_step=request.total_steps,
        beta1=SMOOTHING,
        beta2=SMOOTHING,
        orth_reg_weight=ORTHOGONALITY,
    )
    note_before(request.model, request.facts)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out of Conv1D, and a renamed property of transformers
        torch.manual_seed(request.seed)
        model: Any = take_keywords(get_peft_model(request.model, config))
    model.base_model.rankallocator.target_bgt = ranks

    def finish(trained: torch.nn.Module) -> Finished:
        factors, scale = _left(trained)
        choice = {name: (LORA, len(a)) for name, (a, _) in factors.items()}
        return as_lora(request, trained, plan(request, choice, alpha_over_r=scale), factors)

    note = (
        f"starts with rank {start}, ends with {ranks} ranks on {len(layers)} layers; the kept parameters are "
        "counted then"
    )
    return Prepared(model, trained_params(model, request.facts), None, finish, (Allocator(),), note)


def _left(model: Any) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], float]:
    """A·E and B of the singular values that are left, by layer, and the scale of their product."""
    import torch
    from peft.tuners.adalora import AdaLoraLayer

    factors, scale = {}, 1.0
    pattern = model.peft_config["default"].rank_pattern
    if pattern:  # masks once more: the last optimiser step has moved what was masked before it
        model.base_model.rankallocator.mask_using_rank_pattern(model.base_model.model, pattern)
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, AdaLoraLayer):
            layer: Any = module
            values = layer.lora_E["default"].detach()
            left = torch.nonzero(values[:, 0]).flatten()
            scale = float(layer.scaling["default"] / (layer.ranknum["default"] + 1e-5))
            if len(left):
                factors[name] = ((layer.lora_A["default"] * values)[left], layer.lora_B["default"][:, left])
    return factors, scale


def truncation(request: BaselineRequest) -> Prepared:
    """Trains ``WIDER`` times the budget's uniform rank; afterwards every layer keeps the same share of its energy.

    The share is the largest with which all ranks together fit the budget; ``peft.tuners.lora.convert_to_lora`` cuts.
    """
    layers = layers_with(request, LORA, dense=True)
    uniform = uniform_size(layers, LORA, request.budget)
    widest = min(min(layer.n_in, layer.n_out) for layer in layers)
    rank = min(WIDER * uniform, widest)
    wide = planned(request, plan(request, {layer.name: (LORA, rank) for layer in layers}))
    cost = {layer.name: layer.n_in + layer.n_out for layer in layers}

    def finish(model: torch.nn.Module) -> Finished:
        from peft.tuners.lora import convert_to_lora

        for share in _fitting_shares(model, cost, request.budget):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is LoRA already is the point
                _, tensors = convert_to_lora(model, rank=share)
            factors = {
                name: (tensors[f"{BASE_PREFIX}{name}.lora_A.weight"], tensors[f"{BASE_PREFIX}{name}.lora_B.weight"])
                for name in cost
            }
            # PEFT decomposes in float32: where two shares all but agree, it may keep a rank more.
            if sum(cost[name] * len(a) for name, (a, _) in factors.items()) <= request.budget:
                break
        choice = {name: (LORA, len(a)) for name, (a, _) in factors.items()}
        return as_lora(request, model, plan(request, choice, alpha_over_r=1.0), factors)

    note = f"trains rank {rank} and is cut to the budget afterwards"
    return Prepared(wide.model, wide.trained_params, wide.choice, finish, note=note)


def _fitting_shares(model: Any, cost: dict[str, int], budget: int) -> list[float]:
    """Shares of Σσ² that every layer can keep within the budget, largest first; each layer keeps at least rank 1.

    Each is half-way between two neighbouring cumulative shares, where rounding does not change a rank.
    """
    import torch

    layers = dict(model.get_base_model().named_modules())
    shares = {}
    for name in cost:
        a = layers[name].lora_A["default"].weight.detach().double()
        b = layers[name].lora_B["default"].weight.detach().double()
        energy = torch.linalg.svdvals(torch.linalg.qr(b)[1] @ torch.linalg.qr(a.T)[1].T).square()
        total = energy.sum()
        shares[name] = (energy.cumsum(0) / total).tolist() if total > 0 else [1.0]
    steps = [0.0, *sorted({min(value, 1.0) for cumulative in shares.values() for value in cumulative})]

    def used(share: float) -> int:
        return sum(
            cost[name] * (1 + sum(value < share for value in cumulative[:-1])) for name, cumulative in shares.items()
        )

    middles = [0.5 * (low + high) for low, high in pairwise(steps) if high > low]
    return [share for share in reversed(middles) if used(share) <= budget]


ADALORA = Baseline("AdaLoRA: ranks cut while it trains", adalora)
TRUNCATION = Baseline("twice the rank, cut to the budget after training", truncation)
