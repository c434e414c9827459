"""What a task is judged by. Every task has a record of one batch (small arrays) and the metrics of all records.

Records, not running sums, so that batches evaluated by several processes give the same figures as by one. A task is
added by an entry in ``TASK_METRICS``.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from layerlens.exceptions import TrainingError

if TYPE_CHECKING:
    import torch

    from layerlens.integrations.ultralytics_loss import DetectionTargets

    Batch = Mapping[str, torch.Tensor]

IGNORED, TARGETS = -100, "targets"
ENTITY_TAG = re.compile(r"[BIELSU]-.+")
Record = dict[str, Any]
Decode = Callable[[Sequence[int]], str]
"""From token ids to text, special tokens left out."""


@dataclass(frozen=True)
class TaskMetrics:
    """How one task is evaluated.

    Args:
        record: (model output, batch with its labels, decoder) -> what ``finish`` needs of it, as NumPy arrays. Every
            record has "loss" (the sum over its items) and "items".
        finish: (all records, names of the classes) -> metric by name, without "loss".
        primary: the metric that decides which step was best, the greater the better but for ``LOWER_IS_BETTER``: the
            first of these that ``finish`` gives.
    """

    record: Callable[[Any, Batch, Decode | None], Record]
    finish: Callable[[Sequence[Record], Sequence[str]], dict[str, float]]
    primary: tuple[str, ...]


LOWER_IS_BETTER = ("loss", "mse", "mae", "perplexity")


def task_metrics(task: str) -> TaskMetrics:
    """The metrics of ``task``.

    Raises:
        TrainingError: there are none.
    """
    if task not in TASK_METRICS:
        raise TrainingError(f"no metrics for the task {task!r}; there are some for {', '.join(TASK_METRICS)}")
    return TASK_METRICS[task]


def classification_metrics(predicted: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    """Accuracy, F1 and Matthews correlation of class indices.

    ``f1`` is that of class 1 where there are two classes, as in GLUE; else the mean of all classes' F1 (macro).
    ``mcc`` is the multi-class coefficient (Gorodkin 2004); 0 where predictions or labels are constant.
    """
    classes = int(max(predicted.max(initial=0), actual.max(initial=0))) + 1
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (actual, predicted), 1.0)
    hits, said, true = np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
    seen = (said + true) > 0
    f1 = 2.0 * hits[seen] / (said + true)[seen]
    n = confusion.sum()
    covariance = n * hits.sum() - said @ true
    spread = math.sqrt((n * n - said @ said) * (n * n - true @ true))
    binary = classes <= 2
    return {
        "accuracy": float(hits.sum() / n),
        "f1": float(2.0 * hits[1] / max(1.0, said[1] + true[1])) if binary and classes == 2 else float(f1.mean()),
        "f1_macro": float(f1.mean()),
        "mcc": float(covariance / spread) if spread > 0 else 0.0,
    }


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


def marks_entities(labels: Sequence[str]) -> bool:
    """Whether tags mark entities: ``O``, and B-, I-, E- (L-), S- (U-) with a type, at least one of them a beginning."""
    tags = [str(label) for label in labels if label != "O"]
    return all(ENTITY_TAG.fullmatch(tag) for tag in tags) and any(tag[0] in "BSU" for tag in tags)


def entity_metrics(predicted: Sequence[Sequence[str]], actual: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of whole entities over all types (micro), by seqeval as conlleval counts: an entity is
    right where its type, first and last word are.

    Args:
        predicted, actual: tags of each sample's words.
    """
    from seqeval.metrics import f1_score, precision_score, recall_score

    said, true = ([[_as_iobes(tag) for tag in tags] for tags in samples] for samples in (predicted, actual))
    scores = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
    return {f"entity_{name}": float(score(true, said, zero_division=0)) for name, score in scores.items()}


def _as_iobes(tag: str) -> str:
    """BILOU's names of last and single words as seqeval reads them."""
    return {"L": "E", "U": "S"}.get(tag[0], tag[0]) + tag[1:]


def answer_scores(predicted: str, actual: str) -> tuple[float, float]:
    """(exact match, F1 over words) of an answer, as SQuAD scores it (Rajpurkar et al. 2016, arXiv:1606.05250)."""
    said, true = _normalised(predicted).split(), _normalised(actual).split()
    if not said or not true:
        return (float(said == true),) * 2
    common = sum((Counter(said) & Counter(true)).values())
    return float(said == true), 2.0 * common / (len(said) + len(true))


def _normalised(text: str) -> str:
    """Lower case without punctuation and articles."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy() if tensor.is_floating_point() else tensor.detach().cpu().numpy()


def _join(records: Sequence[Record], key: str) -> np.ndarray:
    return np.concatenate([np.asarray(record[key]).reshape(-1) for record in records])


def _mean_loss(output: Any, items: int) -> Record:
    return {"loss": float(output.loss) * items, "items": items}


def _classes(output: Any, batch: Batch, decode: Decode | None) -> Record:
    labels = batch["labels"].reshape(-1)
    return {
        **_mean_loss(output, len(labels)),
        "predicted": _numpy(output.logits.argmax(-1)),
        "actual": _numpy(labels),
        "rank": _numpy((output.logits > output.logits.gather(-1, labels[:, None])).sum(-1)),
    }


def _finish_classes(records: Sequence[Record], labels: Sequence[str]) -> dict[str, float]:
    return classification_metrics(_join(records, "predicted"), _join(records, "actual"))


def _finish_images(records: Sequence[Record], labels: Sequence[str]) -> dict[str, float]:
    """Top-1 and top-5 accuracy beside the others: how many classes score higher than the right one."""
    rank = _join(records, "rank")
    return {"top1": float((rank < 1).mean()), "top5": float((rank < 5).mean()), **_finish_classes(records, labels)}


def _numbers(output: Any, batch: Batch, decode: Decode | None) -> Record:
    actual = _numpy(batch["labels"]).reshape(-1)
    return {**_mean_loss(output, len(batch["labels"])), "predicted": _numpy(output.logits), "actual": actual}


def _finish_numbers(records: Sequence[Record], labels: Sequence[str]) -> dict[str, float]:
    return regression_metrics(_join(records, "predicted"), _join(records, "actual"))


def _token_classes(output: Any, batch: Batch, decode: Decode | None) -> Record:
    kept = batch["labels"] != IGNORED
    predicted = output.logits.argmax(-1)[kept]
    return {
        **_mean_loss(output, int(kept.sum())),
        "predicted": _numpy(predicted),
        "actual": _numpy(batch["labels"][kept]),
        "words": _numpy(kept.sum(-1)),  # of each sample; the others are further tokens of a word
    }


def _finish_token_classes(records: Sequence[Record], labels: Sequence[str]) -> dict[str, float]:
    """Metrics of single words, and of whole entities where the tags mark them."""
    found = _finish_classes(records, labels)
    if not marks_entities(labels):
        return found
    names = np.array([str(label) for label in labels])
    ends = np.cumsum(_join(records, "words"))[:-1]
    said, true = (np.split(names[_join(records, key)], ends) for key in ("predicted", "actual"))
    return {**entity_metrics([list(x) for x in said], [list(x) for x in true]), **found}


def _tokens(output: Any, batch: Batch, decode: Decode | None, *, shift: int = 0) -> Record:
    labels, logits = batch["labels"], output.logits
    if shift:
        labels, logits = labels[:, shift:], logits[:, :-shift]
    kept = labels != IGNORED
    right = (logits.argmax(-1) == labels)[kept]
    return {**_mean_loss(output, int(kept.sum())), "right": int(right.sum())}


def _next_tokens(output: Any, batch: Batch, decode: Decode | None) -> Record:
    return _tokens(output, batch, decode, shift=1)


def _finish_tokens(records: Sequence[Record], labels: Sequence[str]) -> dict[str, float]:
    items = sum(record["items"] for record in records)
    loss = sum(record["loss"] for record in records) / items
    return {
        "perplexity": math.exp(loss) if loss < 700.0 else math.inf,
        "token_accuracy": sum(record["right"] for record in records) / items,
    }


def _answers(output: Any, batch: Batch, decode: Decode | None) -> Record:
    """Answers as text: of the likeliest span with start ≤ end, and of the labelled one."""
    if decode is None:
        raise TrainingError("question answering is scored on text, so its evaluation needs a decoder")
    start__bt, end__bt = output.start_logits.float(), output.end_logits.float()
    spans = (start__bt[:, :, None] + end__bt[:, None, :]).cpu()
    allowed = np.triu(np.ones(spans.shape[1:], dtype=bool))
    mask = batch["attention_mask"].bool().cpu()
    scores = np.where(allowed & mask.numpy()[:, None, :] & mask.numpy()[:, :, None], spans.numpy(), -np.inf)
    texts = []
    for sample, best in enumerate(scores.reshape(len(scores), -1).argmax(axis=1)):
        ids = batch["input_ids"][sample].tolist()
        start, end = divmod(int(best), scores.shape[-1])
        true = slice(int(batch["start_positions"][sample]), int(batch["end_positions"][sample]) + 1)
        texts.append((decode(ids[start : end + 1]), decode(ids[true])))
    return {**_mean_loss(output, len(texts)), "texts": texts}


def _finish_answers(records: Sequence[Record], labels: Sequence[str]) -> dict[str, float]:
    scores = np.array([answer_scores(*pair) for record in records for pair in record["texts"]])
    return {"exact_match": float(scores[:, 0].mean()), "f1": float(scores[:, 1].mean())}


def _own(output: Any, batch: Batch, decode: Decode | None) -> Record:
    """A model with a loss of the user's: how well it does is its loss."""
    return _mean_loss(output, output.items)


def _objects(output: Any, batch: Batch, decode: Decode | None) -> Record:
    from layerlens.integrations.ultralytics_metrics import matched

    targets = cast("DetectionTargets", batch[TARGETS])
    return {**_mean_loss(output, output.items), "objects": matched(output.output, targets)}


def _finish_objects(records: Sequence[Record], labels: Sequence[str]) -> dict[str, float]:
    from layerlens.integrations.ultralytics_metrics import average_precision

    return average_precision([image for record in records for image in record["objects"]])


TASK_METRICS = {
    "sequence-classification": TaskMetrics(_classes, _finish_classes, ("accuracy",)),
    "image-classification": TaskMetrics(_classes, _finish_images, ("top1",)),
    "regression": TaskMetrics(_numbers, _finish_numbers, ("pearson",)),
    "token-classification": TaskMetrics(_token_classes, _finish_token_classes, ("entity_f1", "f1_macro")),
    "causal-lm": TaskMetrics(_next_tokens, _finish_tokens, ("perplexity",)),
    "masked-lm": TaskMetrics(_tokens, _finish_tokens, ("perplexity",)),
    "seq2seq": TaskMetrics(_tokens, _finish_tokens, ("perplexity",)),
    "question-answering": TaskMetrics(_answers, _finish_answers, ("f1",)),
    "object-detection": TaskMetrics(_objects, _finish_objects, ("map50_95",)),
    "custom": TaskMetrics(_own, lambda records, labels: {}, ("loss",)),
}
