"""Masked language modelling: tokens of a text that were hidden (Devlin et al. 2019, arXiv:1810.04805)."""

from __future__ import annotations

import hashlib

import numpy as np

from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.data.table import Table
from layerlens.exceptions import ConfigurationError
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.tasks.batches import Features
from layerlens.tasks.losses import IGNORED, token_loss
from layerlens.tasks.metrics import TOKENS
from layerlens.tasks.task import Claim, Task
from layerlens.tasks.text import claim_plain_texts, collate_tokens, cut_texts, read_plain_texts, without_classes

MASKED, RANDOM = 0.8, 0.1
"""Of the tokens to be found: share that the mask token replaces, and share that a random token does (BERT)."""


def claim_unlabelled_texts(table: Table, config: DataConfig) -> Claim | None:
    """Texts without anything that could be a label: most checkpoints that have this head are tuned for other tasks."""
    labelled = table.labelled(config) or table.repeating(config)
    return None if labelled else claim_plain_texts(table, config)


def encode(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Texts, long ones as several samples, of which some tokens are to be found: ``data.mlm_probability`` of the tokens
    that are not special, at least one; of those 80 % become the mask token, 10 % a random one, 10 % stay.

    Which they are depends on ``seed`` and on the sample's tokens alone.

    Raises:
        ConfigurationError: the tokenizer has no mask token.
    """
    tokenizer = pretrained.tokenizer
    if tokenizer.mask_token_id is None:
        raise ConfigurationError(
            f"model.task: masked-lm needs a tokenizer with a mask token, {type(tokenizer).__name__} of "
            f"{pretrained.path} has none; use causal-lm"
        )
    special = set(tokenizer.all_special_ids)
    pieces = cut_texts(pretrained, dataset, config)
    found = pieces.like()
    for one in pieces:
        ids = np.array(one["input_ids"])
        candidates = np.flatnonzero([token not in special for token in one["input_ids"]])
        content = hashlib.sha256(f"{seed}:{one['input_ids']}".encode()).digest()
        draw = np.random.default_rng(int.from_bytes(content[:8], "big"))
        count = min(len(candidates), max(1, round(config.mlm_probability * len(candidates))))
        chosen = np.sort(draw.permutation(candidates)[:count])
        labels = np.full(len(ids), IGNORED)
        labels[chosen] = ids[chosen]
        what, random = draw.random(count), draw.integers(0, len(tokenizer), count)
        ids[chosen[what < MASKED]] = tokenizer.mask_token_id
        swapped = (what >= MASKED) & (what < MASKED + RANDOM)
        ids[chosen[swapped]] = random[swapped]
        found.append(one | {"input_ids": ids.tolist(), "labels": labels.tolist()})
    return found


TASK = Task(
    name="masked-lm",
    description="masked tokens of texts; no labels",
    inputs="text",
    read=read_plain_texts,
    claim=claim_unlabelled_texts,
    of_classes=without_classes,
    encode=encode,
    collate=collate_tokens,
    loss=token_loss,
    metrics=TOKENS,
    auto_class="AutoModelForMaskedLM",
    class_endings=("WithLMHeadModel",),
    token_labels=True,
    synthetic_labels=lambda ids__bt: ids__bt.clone(),
)
