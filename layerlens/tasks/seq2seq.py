"""Sequence to sequence: a target text for each source text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.data.readers import FIRST
from layerlens.data.table import Table
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.tasks.batches import Features, Inputs
from layerlens.tasks.losses import IGNORED, token_loss
from layerlens.tasks.metrics import TOKENS
from layerlens.tasks.task import Claim, Task
from layerlens.tasks.text import padded_inputs, padded_labels, tokenized

SOURCES = ("source", "text", "document", "article", "dialogue", "input")
TARGETS = ("target", "summary", "highlights", "translation", "output")


def read(table: Table, config: DataConfig) -> Dataset:
    """Source texts and target texts."""
    source = table.find(config.text_column, "text_column", SOURCES)
    target = table.find(config.label_column, "label_column", TARGETS)
    return Dataset({"text": table.texts(source)}, table.texts(target), (), table.place)


def claim(table: Table, config: DataConfig) -> Claim | None:
    """Two texts, of which the second is another for most samples."""
    source, target = table.named(config.text_column, SOURCES), table.named(config.label_column, TARGETS)
    if not source or not target or target in table.repeating(config):
        return None
    texts = all(isinstance(value, str) for name in (source, target) for value in table.values(name)[:FIRST])
    return Claim(2, f"texts in column {source!r} and texts for them in {target!r}") if texts else None


def encode(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Source texts, each with the tokens of its target text as labels."""
    encoded = tokenized(pretrained, dataset, config)
    longest = config.max_target_length or config.max_length
    targets = pretrained.tokenizer(text_target=list(dataset.labels), truncation=True, max_length=longest)["input_ids"]
    return [one | {"labels": labels} for one, labels in zip(encoded, targets, strict=True)]


def collate(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, Any]:
    """Encoder inputs, and the labels shifted by one as the decoder's.

    The decoder gets another width than the encoder, so that no activation's tokens can be taken for the other's.
    """
    inputs = padded_inputs(pretrained, rows)
    width = max(len(row["labels"]) for row in rows)
    width += width == inputs["input_ids"].shape[1]
    labels = padded_labels(rows, width, "right")
    model: Any = pretrained.model
    inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    inputs["decoder_attention_mask"] = (labels != IGNORED).long()
    return inputs, labels


TASK = Task(
    name="seq2seq",
    description="a target text for each source text",
    inputs="text",
    read=read,
    claim=claim,
    encode=encode,
    collate=collate,
    loss=token_loss,
    metrics=TOKENS,
    auto_class="AutoModelForSeq2SeqLM",
    class_endings=("ForConditionalGeneration", "MTModel"),
    token_labels=True,
    study=False,
)
