"""What a model is fine-tuned for: the loss of a sample, and the targets that it needs beside the inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from layerlens.profiling.batches import class_targets
from layerlens.profiling.losses import IGNORED, Loss, causal_loss, classification_loss, regression_loss

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        loss: of each sample.
        targets: from a batch's inputs and its samples' labels to ``Batch.labels``.
        new_head: whether a pretrained model lacks the head for it, which is then fitted before measuring.
    """

    loss: Loss
    targets: Callable[[Inputs, list[float]], torch.Tensor]
    new_head: bool


def next_tokens(inputs: Inputs, labels: list[float]) -> torch.Tensor:
    """The tokens themselves, int64 [b, t]; no loss where a token or the one before it is padding.

    A token after padding (on the left) is the first of its sample: alone it would be predicted from nothing.
    """
    mask = inputs["attention_mask"].bool()
    before = torch.nn.functional.pad(mask[:, :-1], (1, 0), value=True)
    return inputs["input_ids"].masked_fill(~(mask & before), IGNORED)


TASKS = {
    "sequence-classification": Task(classification_loss, class_targets, new_head=True),
    "regression": Task(regression_loss, lambda inputs, labels: torch.tensor(labels), new_head=True),
    "causal-lm": Task(causal_loss, next_tokens, new_head=False),
}
