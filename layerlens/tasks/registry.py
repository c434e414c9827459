"""The tasks: how samples become inputs and targets, and the loss of a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from layerlens.config import DataConfig, ModelConfig
from layerlens.data import Dataset
from layerlens.exceptions import ConfigurationError
from layerlens.integrations.transformers import PretrainedModel
from layerlens.tasks import custom, images, losses, text
from layerlens.tasks.batches import Features, Inputs
from layerlens.utils.user_code import load_function

Encode = Callable[[PretrainedModel, Dataset, DataConfig, int], list[Features]]
Collate = Callable[[PretrainedModel, Sequence[Features]], tuple[Inputs, Any]]


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        loss: of each sample.
        encode: from a data set to one mapping for each sample, with its target under ``labels``.
        collate: from some of those to ``Batch.inputs`` and ``Batch.labels``.
        new_head: whether a pretrained model lacks the head for it, which is then fitted before measuring.
    """

    loss: losses.Loss
    encode: Encode
    collate: Collate
    new_head: bool


def _no_loss(output: Any, labels: Any) -> torch.Tensor:
    raise ConfigurationError("model.loss: the task custom needs one; give module:function")


TASKS = {
    "sequence-classification": Task(
        losses.classification_loss, text.encode_texts, text.collate_texts(torch.int64), new_head=True
    ),
    "regression": Task(losses.regression_loss, text.encode_texts, text.collate_texts(torch.float32), new_head=True),
    "token-classification": Task(losses.token_loss, text.encode_words, text.collate_tokens, new_head=True),
    "question-answering": Task(losses.span_loss, text.encode_questions, text.collate_spans, new_head=True),
    "causal-lm": Task(losses.causal_loss, text.encode_next_tokens, text.collate_next_tokens, new_head=False),
    "masked-lm": Task(losses.token_loss, text.encode_masked_tokens, text.collate_tokens, new_head=False),
    "seq2seq": Task(losses.token_loss, text.encode_sequences, text.collate_sequences, new_head=False),
    "image-classification": Task(
        losses.classification_loss, images.encode_images, images.collate_images, new_head=True
    ),
    "custom": Task(custom.own_loss(_no_loss, "model.loss"), custom.encode_own, custom.collate_own, new_head=False),
}


def task_for(config: ModelConfig, base_dir: Path | None = None) -> Task:
    """The task of a configuration; ``custom`` with the loss that it names.

    Raises:
        ConfigurationError: the loss cannot be imported.
    """
    task = TASKS[config.task]
    if config.loss is None:
        return task
    return replace(task, loss=custom.own_loss(load_function(config.loss, "model.loss", base_dir), config.loss))
