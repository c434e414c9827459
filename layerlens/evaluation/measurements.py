"""What arms choose by: the product's statistics, and mean gradients with input covariances for others' rank rules."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from layerlens.evaluation.study_task import StudyTask
from layerlens.models import LayerSpec, ModelSpec, ModelStatistics
from layerlens.profiling.measure import measure
from layerlens.profiling.request import STATISTICS, StatisticsRequest
from layerlens.rank_rules import Measured
from layerlens.tasks import Batch
from layerlens.utils.progress import silent

CALIBRATION_SAMPLES = 256
ALL_BUT_KERNEL = tuple(name for name in STATISTICS if name not in ("ntk", "fisher_diagonal"))


@dataclass(frozen=True)
class Profile:
    """Statistics of a task and how long they took, in seconds."""

    statistics: ModelStatistics
    seconds: float


def lora_layers(task: StudyTask) -> list[LayerSpec]:
    """The layers that can take LoRA."""
    return [layer for layer in task.spec.layers if "lora" in layer.methods]


def lora_spec(task: StudyTask) -> ModelSpec:
    """The task's layers with LoRA as their only method."""
    return replace(task.spec, layers=[replace(layer, methods=("lora",)) for layer in lora_layers(task)])


def profile(task: StudyTask, index: torch.Tensor | None = None, names: Sequence[str] = ALL_BUT_KERNEL) -> Profile:
    """Measure the task on training samples, the first 256 unless ``index`` says which."""
    index = torch.arange(min(CALIBRATION_SAMPLES, len(task.train))) if index is None else index
    started = time.perf_counter()
    statistics = measure(
        task.model,
        lora_spec(task),
        task.train.batches(index, 16),
        request=StatisticsRequest.of(names),
        sequence_length=1,
        threads=1,
        progress=silent,
        loss=task.loss,
    )
    return Profile(statistics, time.perf_counter() - started)


@dataclass(frozen=True)
class LayerGradient:
    """Mean gradient [n_out, n_in] of a layer's weight, the weight, and the covariance [n_in, n_in] of its inputs."""

    gradient: torch.Tensor
    weight: torch.Tensor
    input_covariance: torch.Tensor


def layer_gradients(task: StudyTask, batches: Sequence[Batch]) -> dict[str, LayerGradient]:
    """For every layer, over the calibration batches."""
    modules: dict[str, Any] = {layer.name: task.model.get_submodule(layer.name) for layer in lora_layers(task)}
    moments = {name: torch.zeros(module.weight.shape[1], module.weight.shape[1]) for name, module in modules.items()}
    sums = {name: torch.zeros(module.weight.shape[1]) for name, module in modules.items()}
    rows = dict.fromkeys(modules, 0)

    def hook(name: str) -> Callable[..., None]:
        def add(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            h = args[0].detach().reshape(-1, args[0].shape[-1])
            moments[name].addmm_(h.mT, h)
            sums[name] += h.sum(dim=0)
            rows[name] += len(h)

        return add

    n_samples = sum(len(batch.index) for batch in batches)
    try:
        with ExitStack() as stack:
            for name, module in modules.items():
                module.weight.requires_grad_(True)
                stack.callback(module.register_forward_pre_hook(hook(name)).remove)
            for batch in batches:
                (task.loss(task.model(**batch.inputs), batch).sum() / n_samples).backward()
        return {
            name: LayerGradient(
                module.weight.grad.clone(),
                module.weight.detach(),
                moments[name] / rows[name] - torch.outer(sums[name], sums[name]) / rows[name] ** 2,
            )
            for name, module in modules.items()
        }
    finally:
        for module in modules.values():
            module.weight.requires_grad_(False)
            module.weight.grad = None


def rule_quantities(measured: Mapping[str, LayerGradient], statistics: ModelStatistics) -> Measured:
    """Everything that a rank rule may ask about the layers."""
    of = {layer.layer: layer.by_method["lora"] for layer in statistics.layers}
    return {
        "weight_gradient": {name: float((x.weight * x.gradient).abs().mean()) for name, x in measured.items()},
        "gradient_norm": {name: float(x.gradient.norm()) for name, x in measured.items()},
        "fisher_trace": {name: found.trace or 0.0 for name, found in of.items()},
        "explained_variance": {name: explained_variance(x.input_covariance) for name, x in measured.items()},
    }


def explained_variance(covariance: torch.Tensor) -> np.ndarray:
    """Shares of the variance along the principal components, falling, float64 [n]."""
    values = torch.linalg.eigvalsh(covariance.double()).flip(0).clamp(min=0.0)
    return (values / values.sum()).numpy()


def eva_inits(measured: Mapping[str, LayerGradient], ranks: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """EVA's A: the leading principal directions of the inputs, float [rank, n_in]."""
    return {
        name: torch.linalg.eigh(measured[name].input_covariance.double())[1].flip(1)[:, :rank].T.float().contiguous()
        for name, rank in ranks.items()
    }


def gradient_svd_inits(measured: Mapping[str, LayerGradient], ranks: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """LoRA-GA's A (Wang et al. 2024): right singular vectors of the mean gradient, orthonormal, float [rank, n_in]."""
    return {
        name: torch.linalg.svd(measured[name].gradient.double(), full_matrices=False)[2][:rank].float().contiguous()
        for name, rank in ranks.items()
    }
