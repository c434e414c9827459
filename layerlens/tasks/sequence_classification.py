"""Sequence classification: the class of a text or of a pair of texts."""

from __future__ import annotations

from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.data.table import LABELS, Table
from layerlens.data.text_pairs import with_pair
from layerlens.tasks.losses import classification_loss
from layerlens.tasks.metrics import Metrics, finish_classes, record_classes
from layerlens.tasks.task import Task
from layerlens.tasks.text import collate_labelled, encode_labelled


def read(table: Table, config: DataConfig) -> Dataset:
    """Texts or pairs, and their classes."""
    label_column = table.find(config.label_column, "label_column", LABELS)
    columns = table.text_columns(with_pair(table, config), label_column)
    labels, names = table.classes(label_column)
    return Dataset(columns, labels, names, table.place)


TASK = Task(
    name="sequence-classification",
    description="single texts or sentence pairs",
    inputs="text",
    read=read,
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
