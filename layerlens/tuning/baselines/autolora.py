"""AutoLoRA (Zhang et al. 2024, arXiv:2403.09113): ranks by meta-learned selection variables over rank-one parts.

ΔW = Σ_j s_j·b_j·a_jᵀ with s = k·softmax(α) in every layer of starting rank k. In turn, A and B take a step on one half
of the training batches, and α a step down the gradient of the other half's loss *after* that step:

    ∇_α L_val(V − ξ∇_V L_tr(V, α), α) = ∇_α L_val − ξ·[∇_α L_tr(V⁺, α) − ∇_α L_tr(V⁻, α)] / 2ε,  V± = V ± ε·∇_V' L_val

(finite differences as in DARTS, Liu et al. 2019, arXiv:1806.09055). Then the parts with the largest selection variables
are kept and trained again from the start. The paper keeps what exceeds 1/k; here a threshold for the whole model is set
so that what is kept fits the budget. Selection variables start at k·softmax(0) = 1, where the model is plain LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ConfigurationError
from layerlens.integrations.torch_modules import frozen_without_dropout
from layerlens.models import LORA, LayerSpec
from layerlens.tuning.baselines.baseline import Baseline, BaselineRequest, Prepared
from layerlens.tuning.baselines.plain import layers_with, plan, planned, uniform_size
from layerlens.tuning.inject import apply, unapply

if TYPE_CHECKING:
    import torch

WIDER = 2  # starting rank, in uniform ranks of the budget
SELECTION_RATE = 0.05  # Adam's learning rate of α
PERTURBATION = 0.01  # ε is this over the norm of the gradient, as in DARTS


def autolora(request: BaselineRequest) -> Prepared:
    """Learns the ranks in one pass over the batches, then prepares LoRA of these ranks afresh.

    Raises:
        ConfigurationError: fewer than two batches, one to train on and one to judge by.
    """
    if len(request.batches) < 2:
        raise ConfigurationError(
            "baseline autolora: needs at least two training batches, one for the weights and one for the selection "
            f"variables, got {len(request.batches)}"
        )
    layers = layers_with(request, LORA)
    uniform = uniform_size(layers, LORA, request.budget)
    start = min(WIDER * uniform, min(min(layer.n_in, layer.n_out) for layer in layers))
    with frozen_without_dropout(request.model):
        wide = apply(request.model, plan(request, {layer.name: (LORA, start) for layer in layers}))
        selection = search(wide, [layer.name for layer in layers], request)
        unapply(wide)
    ranks = ranks_within(layers, selection, request.budget)
    choice = plan(request, {name: (LORA, rank) for name, rank in ranks.items()})
    return planned(request, choice, note=f"ranks learned from rank {start} on {len(request.batches)} batches")


def ranks_within(layers: Sequence[LayerSpec], selection: dict[str, torch.Tensor], budget: int) -> dict[str, int]:
    """How many parts each layer keeps: those with the largest selection variables of the model, within the budget."""
    cost = {layer.name: layer.n_in + layer.n_out for layer in layers}
    parts = sorted(
        ((-float(value), name, index) for name, values in selection.items() for index, value in enumerate(values)),
    )
    ranks: dict[str, int] = {}
    left = budget
    for _, name, _ in parts:
        if cost[name] <= left:
            ranks[name] = ranks.get(name, 0) + 1
            left -= cost[name]
    return ranks


def search(model: Any, names: Sequence[str], request: BaselineRequest) -> dict[str, torch.Tensor]:
    """Selection variables [k] by layer after one pass over the batches; even ones train, odd ones judge."""
    import torch

    layers = dict(model.get_base_model().named_modules())
    alphas = {
        name: torch.nn.Parameter(torch.zeros(layers[name].r["default"], device=layers[name].weight.device))
        for name in names
    }
    handles = [layers[name].lora_A["default"].register_forward_hook(_Gate(alphas[name])) for name in names]
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    chosen = list(alphas.values())
    inner = torch.optim.AdamW(weights, lr=request.learning_rate, weight_decay=0.0)
    outer = torch.optim.Adam(chosen, lr=SELECTION_RATE, betas=(0.5, 0.999))
    model.eval()  # with dropout, the two sides of a difference would be two networks
    try:
        for step in range(len(request.batches) // 2):
            training, judging = request.batches[2 * step], request.batches[2 * step + 1]
            hyper = hypergradient(model, weights, chosen, training, judging, request)
            for alpha, gradient in zip(chosen, hyper, strict=True):
                alpha.grad = gradient
            outer.step()
            inner.zero_grad()
            gradients = torch.autograd.grad(request.loss(model, training), weights)
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            inner.step()
    finally:
        for handle in handles:
            handle.remove()
        inner.zero_grad()
    return {name: alpha.detach().softmax(0) * len(alpha) for name, alpha in alphas.items()}


def hypergradient(
    model: torch.nn.Module,
    weights: Sequence[torch.nn.Parameter],
    alphas: Sequence[torch.nn.Parameter],
    training: Any,
    judging: Any,
    request: BaselineRequest,
) -> list[torch.Tensor]:
    """Gradient of the judging loss after one step on the training loss, with respect to the selection variables."""
    import torch

    rate = request.learning_rate
    gradients = torch.autograd.grad(request.loss(model, training), weights)
    _shift(weights, gradients, -rate)
    both = torch.autograd.grad(request.loss(model, judging), [*alphas, *weights])
    direct, ahead = both[: len(alphas)], both[len(alphas) :]
    _shift(weights, gradients, rate)
    norm = math.sqrt(sum(float(part.square().sum()) for part in ahead))
    if norm == 0.0:
        return list(direct)
    epsilon = PERTURBATION / norm
    _shift(weights, ahead, epsilon)
    above = torch.autograd.grad(request.loss(model, training), alphas)
    _shift(weights, ahead, -2 * epsilon)
    below = torch.autograd.grad(request.loss(model, training), alphas)
    _shift(weights, ahead, epsilon)
    return [part - rate * (up - down) / (2 * epsilon) for part, up, down in zip(direct, above, below, strict=True)]


def _shift(weights: Sequence[torch.nn.Parameter], directions: Sequence[torch.Tensor], size: float) -> None:
    import torch

    with torch.no_grad():
        for weight, direction in zip(weights, directions, strict=True):
            weight.add_(direction, alpha=size)


class _Gate:
    """Multiplies A's outputs by the selection variables of their rank-one parts."""

    def __init__(self, alpha: torch.nn.Parameter) -> None:
        self.alpha = alpha

    def __call__(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        gate = self.alpha.softmax(0) * len(self.alpha)
        axes = len(getattr(module, "kernel_size", ()))  # which come after the channels
        return output * gate.view(-1, *(1 for _ in range(axes))).to(output.dtype)


AUTOLORA = Baseline("AutoLoRA: ranks by meta-learned selection variables", autolora)
