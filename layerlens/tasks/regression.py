"""Regression: a number for a text or for a pair of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.data.table import LABELS, Table
from layerlens.data.text_pairs import with_pair
from layerlens.data.values import is_number
from layerlens.tasks.losses import regression_loss
from layerlens.tasks.metrics import Decode, Judged, Metrics, Record, as_numpy, joined, mean_loss
from layerlens.tasks.task import Claim, Task
from layerlens.tasks.text import MANY, claim_labelled_texts, collate_labelled, encode_labelled


def read(table: Table, config: DataConfig) -> Dataset:
    """Texts or pairs, and a number for each."""
    label_column = table.find(config.label_column, "label_column", (*LABELS, "score"))
    columns = table.text_columns(with_pair(table, config), label_column)
    return Dataset(columns, table.numbers_of(label_column), (), table.place)


def claim(table: Table, config: DataConfig) -> Claim | None:
    """Texts, each with a number that has a point, or a whole number that no other has."""
    config = with_pair(table, config)
    column = table.named(config.label_column, (*LABELS, "score"))
    return claim_labelled_texts(table, config.model_copy(update={"label_column": column}), _numbers)


def _numbers(values: list[Any]) -> str:
    """``numbers``; "" where there are other values, or whole numbers that look like classes."""
    if not all(map(is_number, values)):
        return ""
    numbers = [float(value) for value in values]
    fractions = any(not number.is_integer() for number in numbers)
    return "numbers" if fractions or len(set(numbers)) == len(values) >= MANY else ""


def record(output: Any, batch: Judged, decode: Decode | None) -> Record:
    """Predicted and actual number of each sample."""
    actual = as_numpy(batch["labels"]).reshape(-1)
    return {**mean_loss(output, len(actual)), "predicted": as_numpy(output.logits), "actual": actual}


def finish(records: Sequence[Record], labels: Sequence[str]) -> dict[str, float]:
    """``regression_metrics`` of all records."""
    return regression_metrics(joined(records, "predicted"), joined(records, "actual"))


def regression_metrics(predicted: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    """Mean squared and absolute error, Pearson and Spearman correlation (0 where one side is constant)."""
    from scipy.stats import pearsonr, spearmanr

    error = predicted - actual
    constant = len(actual) < 2 or np.ptp(predicted) == 0 or np.ptp(actual) == 0
    return {
        "mse": float((error**2).mean()),
        "mae": float(np.abs(error).mean()),
        "pearson": 0.0 if constant else float(pearsonr(predicted, actual).statistic),
        "spearman": 0.0 if constant else float(spearmanr(predicted, actual).statistic),
    }


TASK = Task(
    name="regression",
    description="one number for each text or pair, squared error",
    inputs="text",
    read=read,
    claim=claim,
    encode=encode_labelled,
    collate=collate_labelled("float32"),
    loss=regression_loss,
    metrics=Metrics(record, finish, ("pearson",), lower=("mse", "mae")),
    auto_class="AutoModelForSequenceClassification",
    new_head=True,
    head_config={"num_labels": 1, "problem_type": "regression"},
    peft_type="SEQ_CLS",
    of_images="image-regression",
    synthetic_labels=lambda ids__bt: ids__bt.new_zeros(len(ids__bt)).float(),
)
