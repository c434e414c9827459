"""From a labelled data set to training and test samples: as the model takes them, one by one, without padding."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from layerlens.config import RunConfig
from layerlens.data import TextDataset
from layerlens.data.dataset import TEST_SHARE
from layerlens.exceptions import DataError
from layerlens.integrations.transformers import PretrainedModel
from layerlens.profiling.batches import make_batches
from layerlens.profiling.tasks import TASKS
from layerlens.tuning.samples import Sample, TrainingData

SPANS = ("start_positions", "end_positions")


def split_test(dataset: TextDataset) -> tuple[TextDataset, TextDataset]:
    """(training, test) samples: the test split that profiling leaves alone too, chosen by content."""
    train: list[int] = []
    test: list[int] = []
    for index, text in enumerate(dataset.whole_texts):
        content = hashlib.sha256(text.encode()).digest()
        of_test = int.from_bytes(content[:8], "big") < TEST_SHARE * 2**64
        (test if of_test else train).append(index)
    return dataset.select(train), dataset.select(test)


def training_data(
    dataset: TextDataset, pretrained: PretrainedModel, config: RunConfig, warn: Callable[[str], None]
) -> TrainingData:
    """The samples that ``training`` asks for.

    Raises:
        DataError: nothing is left to train on.
    """
    train, test = split_test(dataset)
    limit = config.training.train_samples
    train, test = _first(train, limit), _first(test, config.training.eval_samples)
    if not len(train):
        raise DataError(f"data.source: none of the {len(dataset)} samples is left for training after the test split")
    if limit is not None and len(train) < limit:
        warn(f"training.train_samples: asked for {limit}, the data has {len(train)} after the test split")
    if not len(test):
        warn(f"data.source: the test split of {len(dataset)} samples is empty, so nothing is evaluated")
    tokenizer = pretrained.tokenizer
    return TrainingData(
        _samples(train, pretrained, config),
        _samples(test, pretrained, config),
        padding={"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": tokenizer.pad_token_type_id},
        left=tokenizer.padding_side == "left",
        decode=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
        fingerprint=f"{train.fingerprint[:16]}-{test.fingerprint[:16]}-{config.data.max_length}",
    )


def _first(dataset: TextDataset, limit: int | None) -> TextDataset:
    """So many samples, spread evenly: files are often sorted by label."""
    if limit is None or limit >= len(dataset):
        return dataset
    return dataset.select([index * len(dataset) // limit for index in range(limit)])


def _samples(dataset: TextDataset, pretrained: PretrainedModel, config: RunConfig) -> list[Sample]:
    if not len(dataset):
        return []
    batches = make_batches(
        pretrained.tokenizer,
        dataset.texts,
        dataset.labels,
        max_length=config.data.max_length,
        batch_size=1,
        pairs=dataset.pairs,
        targets=TASKS[config.model.task].targets,
    )
    by_index: dict[int, Sample] = {}
    for batch in batches:
        labels: dict[str, Any] = {"labels": batch.labels[0]}
        if config.model.task == "question-answering":
            labels = {name: batch.labels[0][column] for column, name in enumerate(SPANS)}
        by_index[int(batch.index[0])] = {name: tensor[0] for name, tensor in batch.inputs.items()} | labels
    return [by_index[index] for index in range(len(dataset))]
