"""Sequence classification: the class of a text or of a pair of texts."""

from __future__ import annotations

from typing import Any

from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.data.table import Table, is_number
from layerlens.tasks.losses import classification_loss
from layerlens.tasks.metrics import Metrics, finish_classes, record_classes
from layerlens.tasks.task import Claim, Task
from layerlens.tasks.text import MANY, claim_labelled_texts, collate_labelled, encode_labelled

SHOWN = 5


def read(table: Table, config: DataConfig) -> Dataset:
    """Texts or pairs, and their classes."""
    label_column = table.find_labels(config)
    columns = table.text_columns(config, label_column)
    labels, names = table.classes(label_column)
    return Dataset(columns, labels, names, table.place)


def claim(table: Table, config: DataConfig) -> Claim | None:
    """Texts, each with a word or whole number."""
    return claim_labelled_texts(table, config, _classes)


def _classes(values: list[Any]) -> str:
    """``2 classes (neg, pos)``; "" where there are other values, numbers with a point, or a number for each sample."""
    names = {str(value) for value in values}
    numbers = all(map(is_number, values))
    scores = numbers and (any("." in name for name in names) or len(names) == len(values) >= MANY)
    if scores or not all(isinstance(value, (str, int)) and value != "" for value in values):
        return ""
    return f"{len(names)} classes ({', '.join(sorted(names))})" if len(names) <= SHOWN else f"{len(names)} classes"


TASK = Task(
    name="sequence-classification",
    description="single texts or sentence pairs",
    inputs="text",
    read=read,
    claim=claim,
    of_classes=lambda dataset: dataset,
    encode=encode_labelled,
    collate=collate_labelled("int64"),
    loss=classification_loss,
    metrics=Metrics(record_classes, finish_classes, ("accuracy",)),
    auto_class="AutoModelForSequenceClassification",
    new_head=True,
    classes=True,
    peft_type="SEQ_CLS",
    synthetic_labels=lambda ids__bt: ids__bt.new_zeros(len(ids__bt)),
)
