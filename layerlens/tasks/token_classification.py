"""Token classification: a tag for each word of a list of words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.data.table import Table
from layerlens.data.values import as_list
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.tasks.batches import Features
from layerlens.tasks.losses import IGNORED, token_loss
from layerlens.tasks.metrics import (
    Decode,
    Judged,
    Metrics,
    Record,
    as_numpy,
    finish_classes,
    joined,
    mean_loss,
)
from layerlens.tasks.task import Claim, Task
from layerlens.tasks.text import by_sample, collate_tokens, fast_tokenizer

NAME = "token-classification"
WORDS, TAGS = ("tokens", "words"), ("tags", "ner_tags", "pos_tags", "chunk_tags", "labels")
ENTITY_TAG = re.compile(r"[BIELSU]-.+")


def read(table: Table, config: DataConfig) -> Dataset:
    """Lists of words, and a tag for each word."""
    words = table.words(table.find(config.text_column, "text_column", WORDS))
    tags, names = table.tags(table.find(config.label_column, "label_column", TAGS), words)
    return Dataset({"words": words}, tags, names, table.place)


def claim(table: Table, config: DataConfig) -> Claim | None:
    """Lists of words, and lists of tags."""
    words, tags = table.named(config.text_column, WORDS), table.named(config.label_column, TAGS)
    if not words or not tags or not all(any(map(as_list, table.peek(name))) for name in (words, tags)):
        return None
    return Claim(2, f"lists of words in column {words!r} and of tags in {tags!r}")


def encode(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Lists of words with a tag each; the tag goes to the first token of its word, the others have no loss."""
    tokenizer = fast_tokenizer(pretrained, NAME)
    words = [list(sample) for sample in dataset.columns["words"]]
    encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=config.max_length)
    found = []
    for sample, (one, tags) in enumerate(zip(by_sample(encoded), dataset.labels, strict=True)):
        labels, previous = [], None
        for word in encoded.word_ids(sample):
            labels.append(tags[word] if word is not None and word != previous else IGNORED)
            previous = word
        found.append(one | {"labels": labels})
    return found


def record(output: Any, batch: Judged, decode: Decode | None) -> Record:
    """Predicted and actual class of each word, and how many words each sample has."""
    kept = batch["labels"] != IGNORED
    return {
        **mean_loss(output, int(kept.sum())),
        "predicted": as_numpy(output.logits.argmax(-1)[kept]),
        "actual": as_numpy(batch["labels"][kept]),
        "words": as_numpy(kept.sum(-1)),  # of each sample; the others are further tokens of a word
    }


def finish(records: Sequence[Record], labels: Sequence[str]) -> dict[str, float]:
    """Metrics of single words, and of whole entities where the tags mark them."""
    found = finish_classes(records, labels)
    if not marks_entities(labels):
        return found
    names = np.array([str(label) for label in labels])
    ends = np.cumsum(joined(records, "words"))[:-1]
    said, true = (np.split(names[joined(records, key)], ends) for key in ("predicted", "actual"))
    return {**entity_metrics([list(x) for x in said], [list(x) for x in true]), **found}


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


TASK = Task(
    name=NAME,
    description="a tag for each word of a list of words",
    inputs="words",
    read=read,
    claim=claim,
    encode=encode,
    collate=collate_tokens,
    loss=token_loss,
    metrics=Metrics(record, finish, ("entity_f1", "f1_macro")),
    auto_class="AutoModelForTokenClassification",
    new_head=True,
    classes=True,
    peft_type="TOKEN_CLS",
    token_labels=True,
    synthetic_labels=lambda ids__bt: ids__bt.new_zeros(ids__bt.shape),
)
