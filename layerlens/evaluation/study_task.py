"""What a study trains on and what its arms choose by: a frozen model, samples in three parts, statistics of the layers.

The product's statistics are for utility models, mean gradients and input covariances for others' rank rules.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from layerlens.exceptions import ConfigurationError
from layerlens.integrations.gradients import CalibrationBatch, layer_moments
from layerlens.models import LORA, LayerSpec, ModelSpec, ModelStatistics
from layerlens.models.model_spec import CONV, NO_MATRIX
from layerlens.profiling.measure import measure
from layerlens.profiling.request import STATISTICS, StatisticsRequest
from layerlens.rank_rules import QUANTITIES, Measured
from layerlens.tasks import Batch, Loss
from layerlens.tuning.baselines.measured import FISHER, quantity, weight_matrix
from layerlens.utils.progress import silent

CALIBRATION_SAMPLES = 256
ALL_BUT_KERNEL = tuple(name for name in STATISTICS if name not in ("ntk", "fisher_diagonal"))


@dataclass(frozen=True)
class Samples:
    """Samples of one length, so that the batches of several arms can be stacked.

    Args:
        inputs: what the model takes, each [n, ...].
        labels: [n, ...], as the task's loss takes them; what is no tensor says itself how rows are taken of it.
        frames: the mask of positions, of a model of sound (see ``Batch``).
    """

    inputs: dict[str, torch.Tensor]
    labels: Any
    frames: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values()), ()))

    def rows(self, index: torch.Tensor) -> Batch:
        """The samples with these indices as a batch."""
        whole = Batch(self.inputs, self.labels, torch.arange(len(self)), frames=self.frames)
        return replace(whole.taken(index), index=torch.arange(len(index)))

    def batches(self, index: torch.Tensor, batch_size: int) -> list[Batch]:
        """The same as calibration batches, which know each sample's position."""
        batches = []
        for start in range(0, len(index), batch_size):
            chosen = self.rows(index[start : start + batch_size])
            batches.append(replace(chosen, index=torch.arange(start, start + len(chosen.index))))
        return batches


@dataclass(frozen=True)
class StudyTask:
    """One task of a study.

    Args:
        name: its name in the results.
        model: frozen, in evaluation mode, its head (where it has one) fitted on frozen features.
        spec: its layers; only their LoRA options are used.
        train, validation, test: disjoint samples.
        loss: of each sample.
        heads: names of the Linears that are trained beside the adapters: those of the task head.
        token_labels: whether labels are tokens; losses are then divided by the number of labelled ones, and the
            metric is the share of them that are predicted right.
        shifted: whether a token's label is the next token's prediction (causal language models).
        spans: whether labels [n, 2] are the first and last token of an answer; the metric is the share of samples in
            which both are right.
        right: see ``Task.right``.
        steps, batch_size: of every run.
        learning_rates: ascending; the sweep.
        ranks: LoRA ranks on offer.
        seeds: of the paired runs at the chosen learning rate.
        sweep_seeds: those of them that the learning rate is chosen on.
        arms_at_once: runs that are trained together.
    """

    name: str
    model: torch.nn.Module
    spec: ModelSpec
    train: Samples
    validation: Samples
    test: Samples
    loss: Loss
    heads: Sequence[str] = ()
    token_labels: bool = False
    shifted: bool = False
    spans: bool = False
    right: Callable[[Any, Any], torch.Tensor] | None = None
    steps: int = 100
    batch_size: int = 8
    learning_rates: Sequence[float] = (1e-3, 2.5e-3, 6.3e-3, 1.6e-2, 4e-2)
    ranks: Sequence[int] = (1, 2, 3, 4, 6, 8, 12, 16)
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    sweep_seeds: Sequence[int] = (0,)
    arms_at_once: int = 64

    def label_count(self, labels: Any) -> torch.Tensor:
        """float [b]: by how much each sample counts in a mean loss: its labelled tokens, or 1."""
        if not self.token_labels:
            return torch.ones(len(labels))
        counted = labels[:, 1:] if self.shifted else labels
        return (counted >= 0).sum(dim=1).float()


@dataclass(frozen=True)
class Profile:
    """Statistics of a task and how long they took, in seconds."""

    statistics: ModelStatistics
    seconds: float


def lora_layers(task: StudyTask) -> list[LayerSpec]:
    """The layers that can take LoRA, and are one matrix each: no convolutions, stacked experts or embeddings."""
    able = [layer for layer in task.spec.layers if LORA in layer.methods]
    matrices = [layer for layer in able if layer.layer_type not in (CONV, *NO_MATRIX)]
    if others := [layer.name for layer in able if layer not in matrices]:
        warnings.warn(
            f"evaluate: {len(others)} convolutions, stacked experts or embeddings ({others[0]} ...) are left out; the "
            "study trains layers with one matrix each",
            stacklevel=2,
        )
    if not matrices:
        raise ConfigurationError(
            "model: no study, which trains layers with one matrix each; this model has only convolutions, stacked "
            "experts or embeddings (run and train adapt them)"
        )
    return matrices


def lora_spec(task: StudyTask) -> ModelSpec:
    """The task's layers with LoRA as their only method."""
    return replace(task.spec, layers=[replace(layer, methods=(LORA,)) for layer in lora_layers(task)])


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
    traces = {layer.layer: layer.by_method[LORA].trace or 0.0 for layer in statistics.layers}
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
