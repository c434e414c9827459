"""Causal language modelling: every next token of a text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.tasks.batches import Features, Inputs
from layerlens.tasks.losses import IGNORED, causal_loss
from layerlens.tasks.metrics import Metrics, finish_tokens, record_tokens
from layerlens.tasks.task import Task
from layerlens.tasks.text import claim_plain_texts, collate_tokens, read_plain_texts, tokenized, without_classes

AHEAD = 1


def encode(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Texts that are their own targets: the labels are the tokens, except padding."""
    return [one | {"labels": list(one["input_ids"])} for one in tokenized(pretrained, dataset, config)]


def collate(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, Any]:
    """As ``collate_tokens``, with no loss for a token whose predecessor is padding.

    A token after padding (on the left) is the first of its sample: alone it would be predicted from nothing.
    """
    import torch

    inputs, labels = collate_tokens(pretrained, rows)
    mask = inputs["attention_mask"].bool()
    before = torch.nn.functional.pad(mask[:, :-AHEAD], (AHEAD, 0), value=True)
    return inputs, labels.masked_fill(~(mask & before), IGNORED)


TASK = Task(
    name="causal-lm",
    description="next tokens; the data needs no labels",
    inputs="text",
    read=read_plain_texts,
    claim=claim_plain_texts,
    of_classes=without_classes,
    encode=encode,
    collate=collate,
    loss=causal_loss,
    metrics=Metrics(partial(record_tokens, shift=AHEAD), finish_tokens, ("perplexity",), lower=("perplexity",)),
    auto_class="AutoModelForCausalLM",
    class_endings=("LMHeadModel", "DoubleHeadsModel"),
    token_labels=True,
    shift=AHEAD,
    synthetic_labels=lambda ids__bt: ids__bt.clone(),
)
