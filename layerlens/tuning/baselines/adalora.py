"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512) by PEFT: its allocator takes singular values away while it trains."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ConfigurationError
from layerlens.integrations.peft import target_modules, task_type
from layerlens.tuning.baselines.conversion import as_lora
from layerlens.tuning.baselines.interface import BaselineRequest, Finished, Prepared
from layerlens.tuning.baselines.plans import layers_with, plan, trained_params, uniform_size
from layerlens.tuning.training import TrainingHook
from layerlens.tuning.undo import note_before

if TYPE_CHECKING:
    import torch

LEAST_STEPS = 4
WARMUP, FINAL = 0.1, 0.3  # shares of the steps before and after the ranks are cut
ALLOCATIONS = 50  # times that the ranks are cut, at most


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
    layers = layers_with(request, "lora", dense=True)
    target = uniform_size(layers, "lora", request.budget)
    ranks = max(len(layers), request.budget * len(layers) // sum(layer.n_in + layer.n_out for layer in layers))
    start = max(target + 1, math.ceil(1.5 * ranks / len(layers)))
    warmup, final = int(WARMUP * request.total_steps), max(1, int(FINAL * request.total_steps))
    config = AdaLoraConfig(
        task_type=task_type(request.facts.task),
        modules_to_save=list(request.facts.heads) or None,
        target_modules=target_modules(request.model, [layer.name for layer in layers]),
        init_r=start,
        target_r=target,
        lora_alpha=request.alpha_over_r * start,  # type: ignore[arg-type] # PEFT declares int and takes any number
        tinit=warmup,
        tfinal=final,
        deltaT=max(1, (request.total_steps - warmup - final) // ALLOCATIONS),
        total_step=request.total_steps,
    )
    note_before(request.model, request.facts)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out of Conv1D, and a renamed property of transformers
        torch.manual_seed(request.seed)
        model: Any = get_peft_model(request.model, config)
    model.base_model.rankallocator.target_bgt = ranks

    def finish(trained: torch.nn.Module) -> Finished:
        factors, scale = _kept(trained)
        choice = {name: ("lora", len(a)) for name, (a, _) in factors.items()}
        return as_lora(request, trained, plan(request, choice, alpha_over_r=scale), factors)

    note = f"starts with rank {start}, ends with {ranks} ranks on {len(layers)} layers; what it keeps is counted then"
    return Prepared(model, trained_params(model, request.facts), None, finish, (Allocator(),), note)


def _kept(model: Any) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], float]:
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
            kept = torch.nonzero(values[:, 0]).flatten()
            scale = float(layer.scaling["default"] / (layer.ranknum["default"] + 1e-5))
            if len(kept):
                factors[name] = ((layer.lora_A["default"] * values)[kept], layer.lora_B["default"][:, kept])
    return factors, scale
