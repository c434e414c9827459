"""The tasks: how samples become inputs and targets, and the loss of a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerlens.config import DataConfig
from layerlens.data import Dataset
from layerlens.integrations.transformers import PretrainedModel
from layerlens.tasks import losses, text
from layerlens.tasks.batches import Features, Inputs

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
}
