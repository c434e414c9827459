"""Sequence classification: the class of a text or of a pair of texts, or all classes that it has (multi-label)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.data.table import Table
from layerlens.data.text_pairs import with_pair
from layerlens.data.values import as_list, is_class, is_number, names_of, separator_of
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.tasks.batches import Features, Inputs
from layerlens.tasks.class_targets import (
    bits_of_classes,
    classes_loss,
    finish_class_targets,
    label_columns,
    label_tensor,
    label_values,
    read_classes,
    record_class_targets,
)
from layerlens.tasks.metrics import Metrics
from layerlens.tasks.task import Claim, Task
from layerlens.tasks.text import MANY, claim_labelled_texts, padded_inputs, tokenized

SHOWN = 5


def read(table: Table, config: DataConfig) -> Dataset:
    """Texts or pairs, and their classes."""
    label_column = label_columns(table, config)
    columns = table.text_columns(with_pair(table, config), label_column if isinstance(label_column, str) else None)
    labels, names = read_classes(table, label_column)
    return Dataset(columns, labels, names, table.place)


def claim(table: Table, config: DataConfig) -> Claim | None:
    """Texts, each with a word or whole number, a list of such, or a 0 or 1 for each class."""
    config = with_pair(table, config)
    if bits := bits_of_classes(table, config):
        return Claim(2, f"the columns of 0 and 1 {_shown(bits)}") if table.text_column(config, None) else None
    return claim_labelled_texts(table, config, _classes)


def _classes(values: list[Any]) -> str:
    """``2 classes (neg, pos)``; "" where there are other values, numbers with a point, or a number for each sample."""
    lists = [as_list(value) for value in values]
    if 2 * sum(one is not None for one in lists) > len(lists) or separator_of(values) is not None:
        return "lists of classes"
    if not all(map(is_class, values)):
        return ""
    names = set(map(str, names_of(values)))
    if all(map(is_number, names)) and (any("." in name for name in names) or len(names) == len(values) >= MANY):
        return ""
    if len(names) == 1:
        return f"1 class ({next(iter(names))})"
    return f"{len(names)} classes ({_shown(sorted(names))})" if len(names) <= SHOWN else f"{len(names)} classes"


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def encode(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Single texts or pairs, with the sample's class, or a 0 or 1 for each class, beside them."""
    encoded = tokenized(pretrained, dataset, config)
    return [one | {"labels": label} for one, label in zip(encoded, label_values(dataset), strict=True)]


def collate(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, Any]:
    """Padding to the longest of the batch; labels int64 [b], or float32 [b, classes]."""
    return padded_inputs(pretrained, rows), label_tensor(rows)


TASK = Task(
    name="sequence-classification",
    description="single texts or sentence pairs; one class each, or several if labels are lists or 0/1 columns "
    "(multi-label)",
    inputs="text",
    read=read,
    claim=claim,
    of_classes=lambda dataset: dataset,
    encode=encode,
    collate=collate,
    loss=classes_loss,
    metrics=Metrics(record_class_targets, finish_class_targets, ("f1_micro", "accuracy")),
    auto_class="AutoModelForSequenceClassification",
    new_head=True,
    classes=True,
    peft_type="SEQ_CLS",
    synthetic_labels=lambda ids__bt: ids__bt.new_zeros(len(ids__bt)),
)
