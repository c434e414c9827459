"""One class for each sample, or several: how both are read, become tensors, have a loss, and are judged.

A sample with several classes has a 1 for each of them and a 0 for every other (multi-hot), as transformers' models take
them with ``problem_type="multi_label_classification"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.data.table import Table
from layerlens.tasks.batches import Batch, Features
from layerlens.tasks.losses import classification_loss, logits_of
from layerlens.tasks.metrics import Decode, Judged, Record, as_numpy, finish_classes, mean_loss, record_classes

if TYPE_CHECKING:
    import torch

SETS = "label_sets"


def label_columns(table: Table, config: DataConfig) -> str | list[str]:
    """The column of the labels, or the columns of 0 and 1 that say which classes a sample has: those that are named, or
    are there where no label column is.
    """
    bits = bits_of_classes(table, config)
    if bits and config.label_column is None:
        table.notes.append(f"multi-label: the columns of 0 and 1 are classes: {', '.join(bits)} (data.label_column)")
    return bits or table.find_labels(config)


def bits_of_classes(table: Table, config: DataConfig) -> list[str]:
    """The columns of 0 and 1, several or none, that say which classes a sample has."""
    given = config.label_column
    if isinstance(given, list) and len(given) > 1:
        return [table.find(name, "label_column", ()) for name in given]
    bits = table.bit_columns() if given is None and table.labelled(config) is None else []
    return bits if len(bits) > 1 else []


def read_classes(table: Table, column: str | list[str]) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """Labels of the samples, each a class or the tuple of its classes, and the names of all classes."""
    if isinstance(column, list):
        return table.bits(column), tuple(column)
    return table.label_sets(column) if table.is_multi_label(column) else table.classes(column)


def label_values(dataset: Dataset) -> list[Any]:
    """What goes under ``labels`` of each encoded sample: its class, or a 1.0 or 0.0 for each class."""
    n = len(dataset.label_names)
    return [
        [float(index in label) for index in range(n)] if isinstance(label, tuple) else label for label in dataset.labels
    ]


def label_tensor(rows: Sequence[Features]) -> torch.Tensor:
    """int64 [b] classes, or float32 [b, classes] of 0 and 1."""
    import torch

    labels = [row["labels"] for row in rows]
    return torch.tensor(labels, dtype=torch.float32 if isinstance(labels[0], list) else torch.int64)


def classes_loss(output: Any, batch: Batch, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy of each sample's class; of several classes the mean binary cross-entropy over all of them, [b]."""
    import torch

    if batch.labels.dim() == 1:
        return classification_loss(output, batch, label_smoothing=label_smoothing)
    logits = logits_of(output)
    return torch.nn.functional.binary_cross_entropy_with_logits(
        logits, batch.labels.to(logits.dtype), reduction="none"
    ).mean(dim=1)


def record_class_targets(output: Any, batch: Judged, decode: Decode | None) -> Record:
    """Predicted and actual classes of each sample; one of several is predicted where its probability is above 1/2."""
    labels = batch["labels"]
    if labels.dim() == 1 or labels.shape[-1] == 1:
        return record_classes(output, batch, decode)
    predicted = as_numpy((output.logits > 0).long())
    return {**mean_loss(output, len(labels)), SETS: np.stack([predicted, as_numpy(labels.long())])}


def finish_class_targets(
    records: Sequence[Record], labels: Sequence[str], *, single: Any = finish_classes
) -> dict[str, float]:
    """Metrics of single classes, or of sets of them."""
    if not records or SETS not in records[0]:
        found: dict[str, float] = single(records, labels)
        return found
    predicted, actual = np.concatenate([record[SETS] for record in records], axis=1)
    return multi_label_metrics(predicted, actual)


def multi_label_metrics(predicted: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    """Of 0 and 1 [samples, classes]: share of samples whose classes are all right, share of right 0s and 1s, and F1
    over all classes (micro) and as the mean of the classes' own (macro), by scikit-learn.
    """
    from sklearn.metrics import f1_score

    micro, macro = (float(f1_score(actual, predicted, average=name, zero_division=0.0)) for name in ("micro", "macro"))
    return {
        "f1_micro": micro,
        "f1_macro": macro,
        "accuracy": float((predicted == actual).all(axis=1).mean()),
        "label_accuracy": float((predicted == actual).mean()),
    }


def finish_with(single: Any) -> Any:
    """``finish_class_targets`` with other metrics of single classes."""
    return partial(finish_class_targets, single=single)
