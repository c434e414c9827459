"""Training samples, how they are padded into batches, and the order they come in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from layerlens.tasks import IGNORED
from layerlens.tasks.metrics import Decode

Sample = Mapping[str, torch.Tensor]
"""What the model takes for one sample, its labels included, each without a batch axis."""

INDEX = "sample_index"
PADDING: dict[str, Any] = {"labels": IGNORED}
"""Value that fills up a sample that is shorter than the longest of its batch; 0 where nothing is said."""


def model_output(model: Any, batch: Mapping[str, Any]) -> Any:
    """What the model returns for a batch with labels; it has ``loss``."""
    return model(**batch)


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


def _padded(row: torch.Tensor, length: int, fill: Any, left: bool) -> torch.Tensor:
    missing = row.new_full((length - len(row), *row.shape[1:]), fill)
    return torch.cat([missing, row] if left else [row, missing])
