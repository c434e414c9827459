"""A task of somebody else's package: how many words a text has, by a Poisson loss on what one output says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from layerlens.config import DataConfig
from layerlens.data import Dataset
from layerlens.data.table import Table
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.tasks import Batch, Metrics, Task, logits_of
from layerlens.tasks.batches import Features, Inputs
from layerlens.tasks.metrics import TARGETS, Decode, Judged, Record, as_numpy, joined, mean_loss
from layerlens.tasks.text import padded_inputs, tokenized


def read(table: Table, config: DataConfig) -> Dataset:
    """Texts, and the number of their words where no column has it."""
    columns = table.text_columns(config, None)
    if config.label_column is None:
        return Dataset(columns, tuple(len(text.split()) for text in columns["text"]), (), table.place)
    return Dataset(columns, table.numbers(config.label_column), (), table.place)


def encode(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    encoded = tokenized(pretrained, dataset, config)
    return [one | {"labels": float(count)} for one, count in zip(encoded, dataset.labels, strict=True)]


def collate(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, torch.Tensor]:
    return padded_inputs(pretrained, rows), torch.tensor([row["labels"] for row in rows])


def loss(output: Any, batch: Batch) -> torch.Tensor:
    return torch.nn.functional.poisson_nll_loss(logits_of(output)[:, 0], batch.labels, reduction="none")


def record(output: Any, batch: Judged, decode: Decode | None) -> Record:
    said, actual = logits_of(output.output)[:, 0].exp(), batch[TARGETS]
    return {**mean_loss(output, len(actual)), "said": as_numpy(said), "actual": as_numpy(actual)}


def finish(records: Sequence[Record], labels: Sequence[str]) -> dict[str, float]:
    return {"words_off": float(np.abs(joined(records, "said") - joined(records, "actual")).mean())}


WORD_COUNT = Task(
    name="word-count",
    description="how many words a text has",
    inputs="text",
    read=read,
    encode=encode,
    collate=collate,
    loss=loss,
    metrics=Metrics(record, finish, ("words_off",), lower=("words_off",)),
    auto_class="AutoModelForSequenceClassification",
    new_head=True,
    head_config={"num_labels": 1},
    model_targets=(),
    synthetic_labels=lambda ids__bt: torch.full((len(ids__bt),), float(ids__bt.shape[1])),
)
