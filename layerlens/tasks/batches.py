"""Samples as batches: of like length, so that little is padding, and made only when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

from layerlens.exceptions import ProfilingError
from layerlens.integrations.arguments import untaken
from layerlens.integrations.audio_input import mask_of_frames
from layerlens.integrations.placement import input_device
from layerlens.integrations.pretrained import PretrainedModel

if TYPE_CHECKING:
    import torch

MASKS = ("attention_mask", "decoder_attention_mask")
LENGTH = "sample_length"
"""Under this name an encoded sample that is no tokens has its length, by which samples are put into batches."""
Inputs = dict[str, "torch.Tensor"]
Features = dict[str, Any]
"""One encoded sample: lists of token ids, an image, or tensors, by the name of the model's argument; and ``labels``."""
Collate = Callable[[PretrainedModel, Sequence[Features]], tuple[Inputs, Any]]
"""From some encoded samples to ``Batch.inputs`` and ``Batch.labels``."""


@dataclass(frozen=True)
class Batch:
    """Some samples.

    Args:
        inputs: what the model takes, each with the samples along its first axis.
        labels: int64 [b] classes, int64 [b, t] labels of tokens, float targets, or what a user's own loss takes.
        index: int64 [b], position of each sample in its data set.
        rows: how many rows of the inputs make one sample: 2 for pairs, one after the other.
        frames: int64 [b, t], the mask of an encoder's positions, where ``attention_mask`` is one of samples of sound.
    """

    inputs: Inputs
    labels: Any
    index: torch.Tensor
    rows: int = 1
    frames: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on ``device``; ``index`` stays in main memory."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        labels = _each_tensor(self.labels, lambda tensor: tensor.to(device))
        frames = None if self.frames is None else self.frames.to(device)
        return replace(self, inputs=inputs, labels=labels, frames=frames)

    def halves_apart(self) -> Batch:
        """The same samples, those with an even index first: each half of the calibration set is then one slice."""
        order = (self.index % 2).argsort(stable=True)
        return self if bool((order.diff() > 0).all()) else self.taken(order)

    def taken(self, order: torch.Tensor) -> Batch:
        """The samples at the places ``order``, int64 [n], in that order."""

        def ordered(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[order.to(tensor.device)]

        def together(tensor: torch.Tensor) -> torch.Tensor:
            return ordered(tensor.unflatten(0, (-1, self.rows))).flatten(0, 1) if self.rows > 1 else ordered(tensor)

        inputs = {name: together(tensor) for name, tensor in self.inputs.items()}
        labels = _each_tensor(self.labels, ordered, order.tolist())
        frames = None if self.frames is None else ordered(self.frames)
        return replace(self, inputs=inputs, labels=labels, index=self.index[order], frames=frames)

    @property
    def masks(self) -> tuple[torch.Tensor, ...]:
        """Masks [b, t] of the inputs, 1 for tokens and 0 for padding; none for images.

        No two of them have the same t: t identifies activations as the encoder's or the decoder's.
        """
        if self.frames is not None:
            return (self.frames, *(self.inputs[name] for name in MASKS[1:] if name in self.inputs))
        return tuple(self.inputs[name] for name in MASKS if name in self.inputs)

    @property
    def mask(self) -> torch.Tensor:
        """[b, t], the mask of the (encoder's) tokens."""
        return self.inputs["attention_mask"]

    @property
    def n_tokens(self) -> int:
        """Unpadded tokens; samples where there are no tokens."""
        if not self.masks and "position_ids" in self.inputs:  # packed
            return self.inputs["input_ids"].numel()
        return sum(int(mask.sum()) for mask in self.masks) if self.masks else len(self.index)


class Batches(Sequence[Batch]):
    """Batches of encoded samples on the model's device, padded (and images decoded) each time one is asked for.

    The shortest samples come first and the longest last. Samples of tensors share a batch only with others of the same
    shapes, since nothing says how those are padded.

    Attributes:
        untaken: names of inputs that the model has no argument for, so that it is not given them.
    """

    def __init__(
        self, collate: Collate, pretrained: PretrainedModel, features: Sequence[Features], *, batch_size: int
    ) -> None:
        self.collate = collate
        self.pretrained = pretrained
        self.features = features
        self.untaken: dict[str, None] = {}
        shapes = [_shapes(one) for one in features]
        order = sorted(range(len(features)), key=lambda sample: (_length(features[sample]), shapes[sample], sample))
        self.plan: list[list[int]] = []
        for sample in order:
            last = self.plan[-1] if self.plan else []
            if last and len(last) < batch_size and shapes[last[0]] == shapes[sample]:
                last.append(sample)
            else:
                self.plan.append([sample])

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def n_samples(self) -> int:
        """Samples of all batches."""
        return sum(map(len, self.plan))

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> Batches: ...

    def __getitem__(self, index: int | slice) -> Batch | Batches:
        import torch

        if isinstance(index, slice):
            part = Batches(self.collate, self.pretrained, self.features, batch_size=1)
            part.plan = self.plan[index]
            return part
        chosen = self.plan[index]
        inputs, labels = self.collate(self.pretrained, [self.features[sample] for sample in chosen])
        self.untaken |= dict.fromkeys(untaken(self.pretrained.model, inputs))
        inputs = {name: value for name, value in inputs.items() if name not in self.untaken}
        rows = len(inputs["input_ids"]) // len(chosen) if "input_ids" in inputs else 1
        frames = mask_of_frames(self.pretrained.model, inputs)
        return Batch(inputs, labels, torch.tensor(chosen), rows, frames).to(input_device(self.pretrained.model))

    @cached_property
    def typical(self) -> Batch:
        """The batch that costs are counted on: the one with the longest samples where these have a length of their own
        (sound), else the first.
        """
        return self[-1 if len(self.features) and LENGTH in self.features[0] else 0]


def _each_tensor(
    labels: Any, change: Callable[[torch.Tensor], torch.Tensor], order: Sequence[int] | None = None
) -> Any:
    """Targets that ``default_collate`` joined, with each tensor [b, ...] changed and lists of b texts in ``order``.

    Targets of another kind say themselves how that is done, by a method ``each_tensor(change, order)``.

    Raises:
        ProfilingError: the samples have to change their order, and nobody knows how these targets do.
    """
    import torch

    if isinstance(labels, torch.Tensor):
        return change(labels)
    if hasattr(labels, "each_tensor"):
        return labels.each_tensor(change, order)
    if isinstance(labels, Mapping):
        return {name: _each_tensor(part, change, order) for name, part in labels.items()}
    if isinstance(labels, (list, tuple)):
        if any(isinstance(part, (str, bytes)) for part in labels):
            return [labels[position] for position in order] if order is not None else labels
        parts = [_each_tensor(part, change, order) for part in labels]
        return type(labels)(*parts) if hasattr(labels, "_fields") else parts
    if order is not None and labels is not None and not isinstance(labels, (bool, int, float)):
        raise ProfilingError(
            f"targets of type {type(labels).__name__} cannot be reordered; give tensors [batch, ...], mappings or "
            "sequences of them, or a method each_tensor(change, order)"
        )
    return labels


def _length(features: Features) -> int:
    return int(features[LENGTH]) if LENGTH in features else len(features.get("input_ids", ()))


def untaken_note(model: torch.nn.Module, name: str) -> str:
    """What the user should know of an input that the model has no argument for."""
    consequence = ": padding counts as tokens" if name in MASKS else ""
    return f"model: {type(model).__name__}.forward takes no {name}, so LayerLens does not pass it{consequence}"


def _shapes(features: Features) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of a sample that is made of tensors."""
    import torch

    found = [(name, tuple(value.shape)) for name, value in features.items() if isinstance(value, torch.Tensor)]
    return tuple(sorted(found))
