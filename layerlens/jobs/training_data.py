"""From a labelled data set to training and test samples: as the model takes them, one by one, without padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch

from layerlens.config import RunConfig
from layerlens.data import Dataset
from layerlens.exceptions import DataError
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.tasks import Batch, Batches, Task, make_batches
from layerlens.tasks.metrics import TARGETS
from layerlens.tuning.samples import Sample, TrainingData


def training_data(
    dataset: Dataset, pretrained: PretrainedModel, task: Task, config: RunConfig, warn: Callable[[str], None]
) -> TrainingData:
    """The samples that ``training`` asks for.

    Raises:
        DataError: nothing is left to train on.
    """
    train, test = dataset.split_test()
    limit = config.training.train_samples
    train, test = _first(train, limit), _first(test, config.training.eval_samples)
    if not len(train):
        raise DataError(f"data.source: none of the {len(dataset)} samples is left for training after the test split")
    if limit is not None and len(train) < limit:
        warn(f"training.train_samples: asked for {limit}, the data has {len(train)} after the test split")
    if not len(test):
        warn(f"data.source: the test split of {len(dataset)} samples is empty, so nothing is evaluated")
    tokenizer = pretrained.tokenizer
    fingerprint = f"{train.fingerprint[:16]}-{test.fingerprint[:16]}-{config.data.max_length}"
    if not task.model_targets:
        return _with_own_loss(train, test, pretrained, task, config, fingerprint)
    texts: dict[str, Any] = {}
    if tokenizer is not None:
        texts = {
            "padding": {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": tokenizer.pad_token_type_id},
            "left": tokenizer.padding_side == "left",
            "decode": lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
        }
    return TrainingData(
        _samples(train, pretrained, task, config),
        _samples(test, pretrained, task, config),
        fingerprint=fingerprint,
        labels=dataset.label_names,
        **texts,
    )


@dataclass(frozen=True)
class Output:
    """What a model without a loss of its own returned, and the mean loss of its samples."""

    loss: torch.Tensor
    items: int
    output: Any


def _with_own_loss(
    train: Dataset, test: Dataset, pretrained: PretrainedModel, task: Task, config: RunConfig, fingerprint: str
) -> TrainingData:
    """Samples whose targets only the task's loss can read; images are opened, and targets joined, batch by batch."""

    def join(rows: Sequence[Any]) -> dict[str, Any]:
        inputs, targets = task.collate(pretrained, rows)
        return {**inputs, TARGETS: targets}

    def output(model: Any, batch: Mapping[str, Any]) -> Output:
        inputs = {name: value for name, value in batch.items() if name != TARGETS}
        n = len(next(iter(inputs.values())))
        whole = Batch(inputs, batch[TARGETS], torch.arange(n)).to(next(model.parameters()).device)
        returned = model(**whole.inputs)
        return Output(task.loss(returned, whole).mean(), n, returned)

    def encoded(samples: Dataset) -> list[Any]:
        return task.encode(pretrained, samples, config.data, config.runtime.seed) if len(samples) else []

    return TrainingData(encoded(train), encoded(test), fingerprint=fingerprint, join=join, output=output)


def _first(dataset: Dataset, limit: int | None) -> Dataset:
    """So many samples, spread evenly: files are often sorted by label."""
    if limit is None or limit >= len(dataset):
        return dataset
    return dataset.select([index * len(dataset) // limit for index in range(limit)])


def _samples(dataset: Dataset, pretrained: PretrainedModel, task: Task, config: RunConfig) -> Sequence[Sample]:
    if not len(dataset):
        return []
    batches = make_batches(task, pretrained, dataset, config.data, batch_size=1, seed=config.runtime.seed)
    return SampleByIndex(batches, task.model_targets)


class SampleByIndex(Sequence[Sample]):
    """The samples of batches of one, by their index in the data set; images are opened when theirs is asked for."""

    def __init__(self, batches: Batches, targets: Sequence[str]) -> None:
        self.batches, self.targets = batches, targets
        self.place = {sample: position for position, (sample,) in enumerate(batches.plan)}

    def __len__(self) -> int:
        return len(self.place)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        batch = self.batches[self.place[index]]
        label, names = batch.labels[0], self.targets
        targets = {name: label[column] for column, name in enumerate(names)} if len(names) > 1 else {names[0]: label}
        return {name: tensor[0] for name, tensor in batch.inputs.items()} | targets
