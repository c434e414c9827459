"""Baselines by rank rules: the ranks of a rule on what was measured of the layers; EVA by its authors' code in PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from layerlens.exceptions import ConfigurationError
from layerlens.integrations.gradients import CalibrationBatch, layer_moments
from layerlens.integrations.peft import target_modules
from layerlens.models import LORA
from layerlens.rank_rules import Measured
from layerlens.rank_rules.published import RHO
from layerlens.registry import RANK_RULES
from layerlens.tasks.metrics import TARGETS
from layerlens.tuning.baselines.baseline import Baseline, BaselineRequest, Prepared
from layerlens.tuning.baselines.plain import layers_with, plan, planned, uniform_size

if TYPE_CHECKING:
    import torch

INNER = "model"
FISHER, VARIANCE = "fisher_trace", "explained_variance"
MEASURED_BATCHES = 32
"""Training batches that rank rules are measured on."""
MOST_BATCHES = 400


def of_rule(name: str, called: str = "", **lora: Any) -> Baseline:
    """The baseline that trains the ranks of the rule ``name``; ``lora`` are fields of ``LoraSettings``."""
    rule = RANK_RULES[name]

    def prepare(request: BaselineRequest) -> Prepared:
        layers = layers_with(request, LORA)
        if rule.needs and not request.batches:
            raise ConfigurationError(f"baseline {called or name}: needs training batches to measure the layers on")
        quantities = measured(request, [layer.name for layer in layers], rule.needs)
        ranks = rule.choose(layers, request.budget, quantities, request.seed)
        if not ranks:
            uniform_size(layers, LORA, request.budget)  # which says what budget would do
        fused = name == "uniform_qv" and any(layer.role == "query_key_value" for layer in layers)
        note = "the projection is fused, so keys are adapted too" if fused else ""
        choice = plan(request, {layer: (LORA, rank) for layer, rank in ranks.items()}, **lora)
        return planned(request, choice, note=note)

    return Baseline(rule.summary, prepare)


def measured(request: BaselineRequest, layers: Sequence[str], needs: Sequence[str]) -> Measured:
    """The quantities that ``needs`` names, of every layer, on the first batches of the training to come.

    Batches count alike, and in the Fisher trace samples do; each of those has a backward pass of its own.
    """
    model = _with_loss(request)
    batches = request.batches[:MEASURED_BATCHES]
    quantities: dict[str, dict[str, Any]] = {need: {} for need in needs}
    if set(needs) - {FISHER}:
        covariances, gradients = VARIANCE in needs, bool(set(needs) - {FISHER, VARIANCE})
        moments = layer_moments(
            model, [f"{INNER}.{name}" for name in layers], [_calibration(batch) for batch in batches],
            covariances=covariances, gradients=gradients,
        )  # fmt: skip
        for name in layers:
            of = moments[f"{INNER}.{name}"]
            gradient = None if of.gradient is None else of.gradient / len(batches)
            weight = weight_matrix(request.model.get_submodule(name))
            for need in set(needs) - {FISHER}:
                quantities[need][name] = quantity(need, weight, gradient, of.covariance)
    if FISHER in needs:
        samples = [sample for batch in batches for sample in _samples(batch)]
        quantities[FISHER] = dict.fromkeys(layers, 0.0)
        for sample in samples:
            moments = layer_moments(
                model, [f"{INNER}.{name}" for name in layers], [_calibration(sample)], gradients=True
            )
            for name in layers:
                gradient = moments[f"{INNER}.{name}"].gradient
                assert gradient is not None
                quantities[FISHER][name] += float(gradient.square().sum()) / len(samples)
    return quantities


def quantity(
    name: str, weight: torch.Tensor, gradient: torch.Tensor | None, covariance: torch.Tensor | None
) -> float | np.ndarray:
    """One of ``rank_rules.QUANTITIES`` from a layer's weight and mean gradient [n_out, n_in] and its inputs' covariance
    [n_in, n_in], of which those that it is made of are given.
    """  # fmt: skip
    import torch

    if name == VARIANCE and covariance is not None:
        values = torch.linalg.eigvalsh(covariance.double()).flip(0).clamp(min=0.0)
        return (values / values.sum()).cpu().numpy()
    if name == "weight_gradient" and gradient is not None:
        return float((weight.to(gradient) * gradient).abs().mean())
    if name == "gradient_norm" and gradient is not None:
        return float(gradient.norm())
    raise ValueError(f"{name} cannot be computed from the measured statistics")


def weight_matrix(module: Any) -> torch.Tensor:
    """The weight as [n_out, n_in]; transformers' Conv1D stores it transposed, a convolution has patches as inputs."""
    weight: torch.Tensor = module.weight.detach()
    return weight.T if hasattr(module, "nx") else weight.flatten(1)


def _with_loss(request: BaselineRequest) -> torch.nn.Module:
    """A module that puts out the mean loss of a batch; the request's model is its ``INNER``."""
    import torch

    class WithLoss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(INNER, request.model)

        def forward(self, **batch: Any) -> torch.Tensor:
            return request.loss(request.model, batch)

    return WithLoss()


def _calibration(batch: Mapping[str, Any]) -> CalibrationBatch:
    return CalibrationBatch(batch, lambda loss: loss)


def _samples(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A batch as batches of one sample."""
    count = len(next(iter(batch.values())))
    return [{name: values[index : index + 1] for name, values in batch.items()} for index in range(count)]


def eva(request: BaselineRequest) -> Prepared:
    """PEFT's own ranks and components, from the largest uniform rank with which they stay within the budget.

    The rule is ``rank_rules.published.eva_ranks`` with whole r; PEFT's components are those of an incremental
    decomposition that ends when they have settled.

    Raises:
        ConfigurationError: no batches, or the components do not settle, or not even rank 1 fits.
    """
    if not request.batches:
        raise ConfigurationError("baseline eva: needs training batches to see the layers' inputs")
    layers = layers_with(request, LORA, dense=True)
    cost = {layer.name: layer.n_in + layer.n_out for layer in layers}
    for rank in range(uniform_size(layers, LORA, request.budget), 0, -1):
        factors = {name: a for name, a in _components(request, list(cost), rank).items() if len(a)}
        if sum(cost[name] * len(a) for name, a in factors.items()) <= request.budget:
            choice = {name: (LORA, len(a)) for name, a in factors.items()}
            return planned(request, plan(request, choice, initialization="pca"), factors)
    raise ConfigurationError(
        f"baseline eva: with rank 1 on average its ranks train more than the budget of {request.budget:,}; "
        f"give {sum(cost.values()):,} or more"
    )


def _components(request: BaselineRequest, names: list[str], rank: int) -> dict[str, torch.Tensor]:
    """A [rank of the layer, n_in] by layer; 0 rows where EVA gives a layer nothing."""
    import torch
    from peft import EvaConfig, LoraConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    config = LoraConfig(
        r=rank,
        target_modules=target_modules(request.model, names),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=RHO, use_label_mask=False),
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(request.seed)
        components: dict[str, torch.Tensor] = get_eva_state_dict(
            request.model,
            _Bounded(request.batches),
            config,
            prepare_model_inputs_fn=_padding_mask,
            prepare_layer_inputs_fn=_unpadded_rows,
            show_progress_bar=False,
        )
    return components


def _padding_mask(inputs: Mapping[str, Any], config: Any) -> Any:
    return inputs.get("attention_mask")


def _unpadded_rows(inputs: Any, mask: Any, name: str) -> torch.Tensor:
    rows: torch.Tensor = inputs if hasattr(inputs, "flatten") else inputs[0]
    return rows[mask.bool()] if mask is not None and rows.shape[:-1] == mask.shape else rows.flatten(0, -2)


class _Bounded:
    """The batches, which PEFT goes through until all components have settled: but not for ever."""

    def __init__(self, batches: Sequence[Mapping[str, Any]]) -> None:
        self.batches, self.seen = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self.batches:
            self.seen += 1
            if self.seen > MOST_BATCHES:
                raise ConfigurationError(
                    f"baseline eva: the components have not settled after {MOST_BATCHES} batches; give larger batches"
                )
            yield {name: value for name, value in batch.items() if name != TARGETS}


UNIFORM_LORA = of_rule("uniform", "uniform-lora")
LORA_QV = of_rule("uniform_qv", "lora-qv")
RSLORA = replace(
    of_rule("uniform", "rslora", use_rslora=True), summary="as uniform-lora, scaled by alpha/√r (arXiv:2312.03732)"
)
EVA = Baseline("EVA: ranks and initialisation from the inputs' components", eva)
