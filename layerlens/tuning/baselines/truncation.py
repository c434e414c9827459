"""Post-hoc truncation: train uniform LoRA of twice the rank, then cut its singular values down to the budget (PEFT)."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from layerlens.integrations.peft import BASE_PREFIX
from layerlens.tuning.baselines.conversion import as_lora
from layerlens.tuning.baselines.interface import BaselineRequest, Finished, Prepared
from layerlens.tuning.baselines.plans import layers_with, plan, planned, uniform_size

if TYPE_CHECKING:
    import torch

WIDER = 2


def truncation(request: BaselineRequest) -> Prepared:
    """Trains ``WIDER`` times the budget's uniform rank; afterwards every layer keeps the same share of its energy.

    The share is the largest with which all ranks together fit the budget; ``peft.tuners.lora.convert_to_lora`` cuts.
    """
    layers = layers_with(request, "lora", dense=True)
    uniform = uniform_size(layers, "lora", request.budget)
    widest = min(min(layer.n_in, layer.n_out) for layer in layers)
    rank = min(WIDER * uniform, widest)
    wide = planned(request, plan(request, {layer.name: ("lora", rank) for layer in layers}))
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
        choice = {name: ("lora", len(a)) for name, (a, _) in factors.items()}
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
