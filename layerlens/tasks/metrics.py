"""What a task is judged by: a record of every batch (small arrays), and the metrics of all records.

Records, not running sums, so that batches evaluated by several processes give the same figures as by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from layerlens.tasks.losses import IGNORED

if TYPE_CHECKING:
    import torch

TARGETS = "targets"
"""Under this name a batch has the targets that only the task's own loss can read."""
Record = dict[str, Any]
Decode = Callable[[Sequence[int]], str]
"""From token ids to text, special tokens left out."""
Judged = Mapping[str, "torch.Tensor"]
"""The batch that the model was given, its targets included."""


@dataclass(frozen=True)
class Metrics:
    """How one task is evaluated.

    Args:
        record: (model output with its mean ``loss``, batch with its targets, decoder) -> what ``finish`` needs of it,
            as NumPy arrays. Every record has "loss" (the sum over its items) and "items".
        finish: (all records, names of the classes) -> metric by name, without "loss".
        primary: the metric that decides which step was best: the first of these that ``finish`` gives.
        lower: those that are the better the lower they are; "loss" is one for every task.
    """

    record: Callable[[Any, Judged, Decode | None], Record]
    finish: Callable[[Sequence[Record], Sequence[str]], dict[str, float]]
    primary: tuple[str, ...]
    lower: tuple[str, ...] = ()

    def better(self, metric: str, value: float, best: float | None, threshold: float = 0.0) -> bool:
        """Whether ``value`` improves on ``best`` by more than ``threshold``."""
        if math.isnan(value):
            return False
        if best is None:
            return True
        return best - value > threshold if metric in ("loss", *self.lower) else value - best > threshold


def mean_loss(output: Any, items: int) -> Record:
    """The part of a record that every task has."""
    return {"loss": float(output.loss) * items, "items": items}


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """In main memory, numbers with a point as float32."""
    return tensor.detach().float().cpu().numpy() if tensor.is_floating_point() else tensor.detach().cpu().numpy()


def joined(records: Sequence[Record], key: str) -> np.ndarray:
    """One array of all records' ``key``, flat."""
    return np.concatenate([np.asarray(record[key]).reshape(-1) for record in records])


LOSS_ONLY = Metrics(
    lambda output, batch, decode: mean_loss(output, output.items), lambda records, labels: {}, ("loss",)
)
"""For a task that is trained with a loss of its own and has nothing else to judge by."""


def record_classes(output: Any, batch: Judged, decode: Decode | None) -> Record:
    """Predicted and actual class of each sample, and how many classes score higher than the actual one."""
    labels = batch["labels"].reshape(-1)
    return {
        **mean_loss(output, len(labels)),
        "predicted": as_numpy(output.logits.argmax(-1)),
        "actual": as_numpy(labels),
        "rank": as_numpy((output.logits > output.logits.gather(-1, labels[:, None])).sum(-1)),
    }


def finish_classes(records: Sequence[Record], labels: Sequence[str]) -> dict[str, float]:
    """``classification_metrics`` of all records."""
    return classification_metrics(joined(records, "predicted"), joined(records, "actual"))


def classification_metrics(predicted: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    """Accuracy, F1 and Matthews correlation (Gorodkin 2004) of class indices, by scikit-learn.

    ``f1`` is that of class 1 where there are two classes, as in GLUE; else the mean of all classes' F1 (macro).
    ``mcc`` is 0 where predictions or labels are constant.
    """
    from sklearn.metrics import f1_score, matthews_corrcoef

    macro = float(f1_score(actual, predicted, average="macro"))
    binary = max(predicted.max(), actual.max()) == 1
    varied = np.ptp(predicted) > 0 and np.ptp(actual) > 0
    return {
        "accuracy": float((predicted == actual).mean()),
        "f1": float(f1_score(actual, predicted, zero_division=0.0)) if binary else macro,
        "f1_macro": macro,
        "mcc": float(matthews_corrcoef(actual, predicted)) if varied else 0.0,
    }


def record_tokens(output: Any, batch: Judged, decode: Decode | None, *, shift: int = 0) -> Record:
    """How many labelled tokens are predicted right, ``shift`` tokens ahead."""
    labels, logits = batch["labels"], output.logits
    if shift:
        labels, logits = labels[:, shift:], logits[:, :-shift]
    kept = labels != IGNORED
    right = (logits.argmax(-1) == labels)[kept]
    return {**mean_loss(output, int(kept.sum())), "right": int(right.sum())}


def finish_tokens(records: Sequence[Record], labels: Sequence[str]) -> dict[str, float]:
    """Perplexity and share of right tokens."""
    items = sum(record["items"] for record in records)
    loss = sum(record["loss"] for record in records) / items
    return {
        "perplexity": math.exp(loss) if loss < 700.0 else math.inf,
        "token_accuracy": sum(record["right"] for record in records) / items,
    }


TOKENS = Metrics(record_tokens, finish_tokens, ("perplexity",), lower=("perplexity",))
"""Of language models whose labels stand at their own tokens."""
