"""What a model is trained and judged on: samples, their batches, the order they come in, and its metrics over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, overload

import torch

from layerlens.config import RunConfig
from layerlens.data import Dataset
from layerlens.exceptions import DataError, TrainingError
from layerlens.integrations.arguments import takes_all, untaken
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.integrations.torch_modules import in_evaluation_mode
from layerlens.tasks import IGNORED, Batch, Batches, Task, make_batches, task_metrics
from layerlens.tasks.encoded import Encoded, notes_of, tokens_digest
from layerlens.tasks.losses import logits_of
from layerlens.tasks.metrics import TARGETS, Decode, Record
from layerlens.utils.progress import Progress, silent

Sample = Mapping[str, torch.Tensor]
"""What the model takes for one sample, its labels included, each without a batch axis."""

INDEX = "sample_index"
PADDING: dict[str, Any] = {"labels": IGNORED}
"""Value that fills up a sample that is shorter than the longest of its batch; 0 where nothing is said."""


def model_output(model: Any, batch: Mapping[str, Any]) -> Any:
    """What the model returns for a batch with labels; it has ``loss``."""
    return model(**batch)


def packed_output(model: Any, batch: Mapping[str, Any]) -> Any:
    """The same of packed rows: with a cache, models look from one text of a row into another."""
    return model(**batch, use_cache=False)


@dataclass(frozen=True)
class TrainingData:
    """What a model is trained and judged on.

    Args:
        train, evaluation: samples; their order is their identity (checkpoints and messages name samples by index).
        padding: value that fills up each input, by its name, where it is not that of ``PADDING``.
        left: pad on the left, as generating models want.
        decode: from token ids to text, for metrics on text.
        fingerprint: identity of the samples; a checkpoint made with others is not gone on with.
        labels: names of the classes, for metrics that read them.
        join: from some samples to a batch, where they are not tensors that are padded and stacked.
        output: (model, batch) -> an output with the mean ``loss`` of the batch, where the model computes none itself.
    """

    train: Sequence[Sample]
    evaluation: Sequence[Sample]
    padding: Mapping[str, Any] = field(default_factory=dict)
    left: bool = False
    decode: Decode | None = None
    fingerprint: str = ""
    labels: Sequence[str] = ()
    join: Callable[[Sequence[Sample]], dict[str, Any]] | None = None
    output: Callable[[Any, Mapping[str, Any]], Any] = model_output

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """One batch: inputs of unequal length are padded along their first axis."""
        if self.join is not None:
            numbers = [sample[INDEX] for sample in samples if INDEX in sample]
            without = [{name: value for name, value in sample.items() if name != INDEX} for sample in samples]
            return self.join(without) | ({INDEX: torch.stack(numbers)} if numbers else {})
        batch: dict[str, Any] = {}
        for name in samples[0]:
            rows = [torch.as_tensor(sample[name]) for sample in samples]
            if rows[0].dim() and len({len(row) for row in rows}) > 1:
                fill = self.padding.get(name, PADDING.get(name, 0))
                longest = max(len(row) for row in rows)
                rows = [_padded(row, longest, fill, self.left) for row in rows]
            batch[name] = torch.stack(rows)
        return batch


class NumberedSamples(torch.utils.data.Dataset):
    """Samples that know their index, so that a batch that goes wrong can be named."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**self.samples[index], INDEX: torch.tensor(index)}


class SeededOrder(torch.utils.data.Sampler[int]):
    """A permutation of the samples for every epoch, drawn from ``seed`` and the epoch alone.

    Every method that is compared sees the same samples in the same order, whatever else draws random numbers.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed, self.epoch = n, seed, 0

    def __len__(self) -> int:
        return self.n

    def set_epoch(self, epoch: int) -> None:
        """The epoch that is iterated next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        yield from torch.randperm(self.n, generator=generator).tolist()


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on ``device``."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


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
        warn(f"data.source: the test split of {len(dataset)} samples is empty, so there is no evaluation")
    tokenizer = pretrained.tokenizer
    more: dict[str, Any] = {"labels": dataset.label_names}
    if tokenizer is not None:
        more["decode"] = lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))
    if not (task.model_targets and takes_all(pretrained.model, task.model_targets)):
        seed = config.runtime.seed
        first, last = (
            make_batches(task, pretrained, part, config.data, batch_size=1, seed=seed, limit=most).features
            if len(part) else [] for part, most in ((train, limit), (test, config.training.eval_samples))
        )  # fmt: skip
        _tell(dataset, first, warn)
        for line in notes_of(last):
            if "left out" in line:
                warn(f"{line} (of the test split)")
        fingerprint = _fingerprint(train, test, first, config)
        join = partial(_join, task, pretrained)
        output = partial(_output, task)
        return TrainingData(first, last, fingerprint=fingerprint, join=join, output=output, **more)
    if tokenizer is not None:
        pad = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": tokenizer.pad_token_type_id}
        more |= {"padding": pad, "left": tokenizer.padding_side == "left"}
    samples = _samples(train, pretrained, task, config, limit)
    features: Any = getattr(getattr(samples, "batches", None), "features", ())
    _tell(dataset, features, warn)
    more["fingerprint"] = _fingerprint(train, test, features, config)
    if len(features) and "position_ids" in features[0]:
        more["output"] = packed_output
    return TrainingData(samples, _samples(test, pretrained, task, config, config.training.eval_samples), **more)


def _tell(dataset: Dataset, features: Any, warn: Callable[[str], None]) -> None:
    """What became of the rows of the training samples."""
    for line in (*dataset.notes, *notes_of(features)):
        warn(line)


def _fingerprint(train: Dataset, test: Dataset, features: Any, config: RunConfig) -> str:
    """Identity of rows and of the tokens that were made of them."""
    rows = f"{train.fingerprint[:16]}-{test.fingerprint[:16]}-{config.data.max_length}"
    return f"{rows}-{tokens_digest(features)[:16]}" if isinstance(features, Encoded) else rows


@dataclass(frozen=True)
class Output:
    """What a model without a loss of its own returned, the mean loss of its samples, and, where it is judged by that,
    what it writes by itself.
    """

    loss: torch.Tensor
    items: int
    output: Any
    generated: Any = None

    @property
    def logits(self) -> torch.Tensor:
        """Those of the model, or its output if that is a tensor."""
        return logits_of(self.output)

    def __getattr__(self, name: str) -> Any:
        if name == "output":  # while it is being made
            raise AttributeError(name)
        return getattr(self.output, name)


def _join(task: Task, pretrained: PretrainedModel, rows: Sequence[Any]) -> dict[str, Any]:
    """A batch whose targets only the task's loss can read; images are opened, and targets joined, batch by batch.

    Metrics find the targets under the names that other models take them by, too.
    """
    inputs, targets = task.collate(pretrained, rows)
    left_out = untaken(pretrained.model, inputs)
    names = task.model_targets
    columns = {name: targets[:, place] for place, name in enumerate(names)} if len(names) > 1 else {}
    named = columns or dict.fromkeys(names, targets)
    return {**{name: value for name, value in inputs.items() if name not in left_out}, **named, TARGETS: targets}


def _output(task: Task, model: Any, batch: Mapping[str, Any]) -> Output:
    inputs = {name: value for name, value in batch.items() if name not in (*task.model_targets, TARGETS)}
    rows = 1 if task.reference is None else 2
    n = len(batch[TARGETS]) if task.coupled else len(next(iter(inputs.values()))) // rows
    rows = len(next(iter(inputs.values()))) // n
    whole = Batch(inputs, batch[TARGETS], torch.arange(n), rows).to(next(model.parameters()).device)
    returned = model(**whole.inputs)
    loss__b = task.loss(returned, whole)
    written = None if task.generate is None or torch.is_grad_enabled() else task.generate(model, whole)
    if task.token_labels:  # a mean over tokens, as models compute it of texts
        items = int((whole.labels[:, task.shift :] != IGNORED).sum())
        return Output(loss__b.sum() / max(1, items), items, returned, written)
    return Output(loss__b.mean(), n, returned, written)


def evaluate(
    model: torch.nn.Module,
    data: TrainingData,
    task: str,
    *,
    samples: Sequence[Sample] | None = None,
    batch_size: int = 32,
    shared: bool = True,
    progress: Progress = silent,
) -> dict[str, float]:
    """Mean loss and the task's metrics over ``samples`` (the evaluation samples unless given), without gradients.

    Samples go into batches in their own order. In a distributed run every process takes its share of the batches and
    all of them return the same figures. The model is left in the mode it was in.

    Args:
        model: gives ``loss`` and ``logits`` (start and end logits for question answering) for a collated batch.
        data: how samples are collated.
        task: a name in ``TASKS``.
        shared: whether all processes of a distributed run call this; False where one of them does, alone.

    Returns:
        "loss" (mean over samples, or over tokens for language models), and metric by name.

    Raises:
        TrainingError: there are no samples, or there is no such task.
    """
    chosen, metrics = data.evaluation if samples is None else samples, task_metrics(task)
    if not len(chosen):
        raise TrainingError("there are no samples to evaluate on")
    rank, world = 0, 1
    if shared and torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    device = next(model.parameters()).device
    starts = list(range(0, len(chosen), batch_size))
    records: dict[int, Record] = {}
    total = len(starts[rank::world])
    with in_evaluation_mode(model), torch.no_grad(), progress.stage("Evaluating", total=total) as advance:
        for start in starts[rank::world]:
            batch = data.collate([chosen[index] for index in range(start, min(start + batch_size, len(chosen)))])
            batch = on_device(batch, device)
            records[start] = metrics.record(data.output(model, batch), batch, data.decode)
            advance(1)
    if world > 1:
        records = _gathered(records, world)
    in_order = [records[start] for start in starts]
    loss = sum(record["loss"] for record in in_order) / max(1, sum(record["items"] for record in in_order))
    return {"loss": loss, **metrics.finish(in_order, data.labels)}


def _first(dataset: Dataset, limit: int | None) -> Dataset:
    """So many samples, spread evenly: files are often sorted by label."""
    if limit is None or limit >= len(dataset):
        return dataset
    return dataset.select([index * len(dataset) // limit for index in range(limit)])


def _samples(
    dataset: Dataset, pretrained: PretrainedModel, task: Task, config: RunConfig, limit: int | None
) -> Sequence[Sample]:
    if not len(dataset):
        return []
    seed = config.runtime.seed
    batches = make_batches(task, pretrained, dataset, config.data, batch_size=1, seed=seed, limit=limit)
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


def _gathered(records: dict[int, Record], world: int) -> dict[int, Record]:
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, records)
    return {start: record for part in parts for start, record in part.items()}


def _padded(row: torch.Tensor, length: int, fill: Any, left: bool) -> torch.Tensor:
    missing = row.new_full((length - len(row), *row.shape[1:]), fill)
    return torch.cat([missing, row] if left else [row, missing])
