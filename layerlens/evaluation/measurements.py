"""What arms choose by: the product's statistics, and mean gradients with input covariances for others' rank rules."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from layerlens.evaluation.study_task import StudyTask
from layerlens.integrations.gradients import CalibrationBatch, layer_moments
from layerlens.models import LayerSpec, ModelSpec, ModelStatistics
from layerlens.profiling.measure import measure
from layerlens.profiling.request import STATISTICS, StatisticsRequest
from layerlens.rank_rules import QUANTITIES, Measured
from layerlens.tasks import Batch
from layerlens.tuning.baselines.measured import FISHER, quantity, weight_matrix
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
    names = [layer.name for layer in lora_layers(task)]
    n_samples = sum(len(batch.index) for batch in batches)

    def calibration(batch: Batch) -> CalibrationBatch:
        return CalibrationBatch(batch.inputs, lambda output: task.loss(output, batch).sum())

    moments = layer_moments(task.model, names, [calibration(x) for x in batches], covariances=True, gradients=True)
    measured = {}
    for name, of in moments.items():
        assert of.gradient is not None
        assert of.covariance is not None
        weight = weight_matrix(task.model.get_submodule(name))
        measured[name] = LayerGradient((of.gradient / n_samples).float(), weight, of.covariance.float())
    return measured


def rule_quantities(measured: Mapping[str, LayerGradient], statistics: ModelStatistics) -> Measured:
    """Everything that a rank rule may ask about the layers."""
    traces = {layer.layer: layer.by_method["lora"].trace or 0.0 for layer in statistics.layers}
    return {
        need: traces
        if need == FISHER
        else {name: quantity(need, x.weight, x.gradient, x.input_covariance) for name, x in measured.items()}
        for need in QUANTITIES
    }


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
