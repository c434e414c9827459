"""Extractive question answering: where in a context the answer stands (Rajpurkar et al. 2016, arXiv:1606.05250)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.data.table import Table
from layerlens.data.values import answers_of
from layerlens.exceptions import DataError, TrainingError
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.tasks.batches import Features, Inputs
from layerlens.tasks.losses import span_loss
from layerlens.tasks.metrics import Decode, Judged, Metrics, Record, mean_loss
from layerlens.tasks.task import Claim, Task
from layerlens.tasks.text import fast_tokenizer, padded_inputs

NAME = "question-answering"
FIRST, LAST = "start_positions", "end_positions"


def read(table: Table, config: DataConfig) -> Dataset:
    """Questions, their contexts, and the answers in them."""
    questions = table.texts(table.find(config.text_column, "text_column", ("question",)))
    contexts = table.texts(table.find(config.pair_column, "pair_column", ("context",)))
    answers = table.answers(table.find(config.label_column, "label_column", ("answers",)), contexts)
    return Dataset({"text": questions, "pair": contexts}, answers, (), table.place)


def claim(table: Table, config: DataConfig) -> Claim | None:
    """Questions, contexts and answers."""
    question, context = table.named(config.text_column, ("question",)), table.named(config.pair_column, ("context",))
    answers = table.named(config.label_column, ("answers",))
    found = question and context and answers and any(map(answers_of, table.peek(answers)))
    return Claim(3, "questions with contexts and answers") if found else None


def encode(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Question and context, with the first and last token of the answer as labels.

    A context that is longer than ``data.max_length`` is cut into windows that overlap by half, and the first window
    that has the whole answer is taken; questions without an answer point at the first token.

    Raises:
        DataError: no window has the whole of an answer, or a question is as long as a whole sequence.
    """
    tokenizer = fast_tokenizer(pretrained, NAME)
    found = []
    texts, contexts = dataset.columns["text"], dataset.columns["pair"]
    for number, (question, context, answers) in enumerate(zip(texts, contexts, dataset.labels, strict=True), start=1):
        room = config.max_length - len(tokenizer(question, "")["input_ids"])
        if room < 1:
            raise DataError(
                f"data.max_length: sample {number}'s question leaves no room for its context in {config.max_length} "
                f"tokens; raise it: {question[:60]!r}"
            )
        windows = tokenizer(
            question, context, truncation="only_second", max_length=config.max_length, stride=room // 2,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        start, text = answers[0] if answers else (0, "")
        spans = [_span(windows, window, start, start + len(text)) for window in range(len(windows["input_ids"]))]
        chosen = next((window for window, span in enumerate(spans) if span is not None), None)
        if chosen is None:
            raise DataError(
                f"data.max_length: the answer {text[:60]!r} of sample {number} is longer than half of what "
                f"{config.max_length} tokens leave for the context; raise it"
            )
        names = [name for name in tokenizer.model_input_names if name in windows]
        found.append({name: windows[name][chosen] for name in names} | {"labels": list(spans[chosen] or (0, 0))})
    return found


def collate(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, Any]:
    """Padding to the longest of the batch; labels [b, 2], moved by what is padded on the left."""
    import torch

    inputs = padded_inputs(pretrained, rows)
    labels = torch.tensor([row["labels"] for row in rows])
    if pretrained.tokenizer.padding_side == "left":
        width = inputs["input_ids"].shape[1]
        labels = labels + torch.tensor([[width - len(row["input_ids"])] for row in rows])
    return inputs, labels


def record(output: Any, batch: Judged, decode: Decode | None) -> Record:
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
        true = slice(int(batch[FIRST][sample]), int(batch[LAST][sample]) + 1)
        texts.append((decode(ids[start : end + 1]), decode(ids[true])))
    return {**mean_loss(output, len(texts)), "texts": texts}


def finish(records: Sequence[Record], labels: Sequence[str]) -> dict[str, float]:
    """Mean exact match and F1 of all answers."""
    scores = np.array([answer_scores(*pair) for record in records for pair in record["texts"]])
    return {"exact_match": float(scores[:, 0].mean()), "f1": float(scores[:, 1].mean())}


def answer_scores(predicted: str, actual: str) -> tuple[float, float]:
    """(exact match, F1 over words) of an answer, as SQuAD scores it."""
    said, true = _normalised(predicted).split(), _normalised(actual).split()
    if not said or not true:
        return (float(said == true),) * 2
    common = sum((Counter(said) & Counter(true)).values())
    return float(said == true), 2.0 * common / (len(said) + len(true))


def _normalised(text: str) -> str:
    """Lower case without punctuation and articles."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept)


def _span(windows: Any, window: int, start: int, end: int) -> tuple[int, int] | None:
    """First and last token of the characters [start, end) of the context; None where the window lacks some of them."""
    if start == end:
        return 0, 0
    places = zip(windows.sequence_ids(window), windows["offset_mapping"][window], strict=True)
    inside = [token for token, (part, (a, b)) in enumerate(places) if part == 1 and a < end and b > start]
    if not inside:
        return None
    offsets = windows["offset_mapping"][window]
    whole = offsets[inside[0]][0] <= start and offsets[inside[-1]][1] >= end
    return (inside[0], inside[-1]) if whole else None


TASK = Task(
    name=NAME,
    description="position of the answer in a context, as in SQuAD",
    inputs="text",
    read=read,
    claim=claim,
    encode=encode,
    collate=collate,
    loss=span_loss,
    metrics=Metrics(record, finish, ("f1",)),
    auto_class="AutoModelForQuestionAnswering",
    class_endings=("ForQuestionAnsweringSimple",),
    new_head=True,
    model_targets=(FIRST, LAST),
)
