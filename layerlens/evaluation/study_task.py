"""What a study trains on: a frozen model, its layers, and samples in three parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from layerlens.models import ModelSpec
from layerlens.tasks import Batch, Loss


@dataclass(frozen=True)
class Samples:
    """Samples of one length, so that the batches of several arms can be stacked.

    Args:
        inputs: what the model takes, each [n, ...].
        labels: [n, ...], as the task's loss takes them.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: torch.Tensor) -> Batch:
        """The samples with these indices as a batch."""
        inputs = {name: values[index] for name, values in self.inputs.items()}
        return Batch(inputs, self.labels[index], torch.arange(len(index)))

    def batches(self, index: torch.Tensor, batch_size: int) -> list[Batch]:
        """The same as calibration batches, which know each sample's position."""
        batches = []
        for start in range(0, len(index), batch_size):
            chosen = self.rows(index[start : start + batch_size])
            batches.append(Batch(chosen.inputs, chosen.labels, torch.arange(start, start + len(chosen.index))))
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
        head: name of the Linear that is trained beside the adapters; None where the head is frozen.
        token_labels: whether labels are tokens; losses are then divided by the number of labelled ones, and the
            metric is the share of them that are predicted right.
        shifted: whether a token's label is the next token's prediction (causal language models).
        spans: whether labels [n, 2] are the first and last token of an answer; the metric is the share of samples in
            which both are right.
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
    head: str | None = None
    token_labels: bool = False
    shifted: bool = False
    spans: bool = False
    steps: int = 100
    batch_size: int = 8
    learning_rates: Sequence[float] = (1e-3, 2.5e-3, 6.3e-3, 1.6e-2, 4e-2)
    ranks: Sequence[int] = (1, 2, 3, 4, 6, 8, 12, 16)
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    sweep_seeds: Sequence[int] = (0,)
    arms_at_once: int = 64

    def label_count(self, labels: torch.Tensor) -> torch.Tensor:
        """float [b]: by how much each sample counts in a mean loss: its labelled tokens, or 1."""
        if not self.token_labels:
            return torch.ones(len(labels))
        counted = labels[:, 1:] if self.shifted else labels
        return (counted >= 0).sum(dim=1).float()
