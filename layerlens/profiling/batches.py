"""Calibration samples as padded batches of token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

MASKS = ("attention_mask", "decoder_attention_mask")


@dataclass(frozen=True)
class Batch:
    """Some calibration samples.

    Args:
        inputs: what the model takes, each with the samples along its first axis.
        labels: int64 [b] classes, int64 [b, t] labels of tokens, or float targets.
        index: int64 [b], position of each sample in the calibration set.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    index: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on ``device``; ``index`` stays in main memory."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Batch(inputs, self.labels.to(device), self.index)

    def halves_apart(self) -> Batch:
        """The same samples, those with an even index first: each half of the calibration set is then one slice."""
        order = (self.index % 2).argsort(stable=True)
        if bool((order.diff() > 0).all()):
            return self
        there = order.to(self.labels.device)
        inputs = {name: tensor[there] for name, tensor in self.inputs.items()}
        return Batch(inputs, self.labels[there], self.index[order])

    @property
    def masks(self) -> tuple[torch.Tensor, ...]:
        """Masks [b, t] of the inputs, 1 for tokens and 0 for padding; none for images."""
        return tuple(self.inputs[name] for name in MASKS if name in self.inputs)

    @property
    def mask(self) -> torch.Tensor:
        """[b, t], the mask of the (encoder's) tokens."""
        return self.inputs["attention_mask"]

    @property
    def n_tokens(self) -> int:
        """Unpadded tokens; samples where there are no tokens."""
        return sum(int(mask.sum()) for mask in self.masks) if self.masks else len(self.index)


def class_targets(inputs: dict[str, torch.Tensor], labels: list[float]) -> torch.Tensor:
    """Classes, int64 [b]."""
    return torch.tensor([int(label) for label in labels])


def make_batches(
    tokenizer: Any,
    texts: Sequence[str],
    labels: Sequence[float],
    *,
    max_length: int,
    batch_size: int,
    pairs: Sequence[str] = (),
    targets: Callable[[dict[str, torch.Tensor], list[float]], torch.Tensor] = class_targets,
) -> list[Batch]:
    """Batches of texts of like length, longest last, so that little is padding.

    Args:
        tokenizer: a transformers tokenizer.
        texts, labels: the samples.
        max_length: longest sequence, in tokens; longer ones are truncated.
        batch_size: samples in a batch.
        pairs: the second sentence of each text, where there are any.
        targets: from a batch's inputs and labels to ``Batch.labels``; int64 classes unless given.
    """
    encoded = tokenizer(list(texts), list(pairs) or None, truncation=True, max_length=max_length)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    order = sorted(range(len(texts)), key=lambda sample: (lengths[sample], sample))
    batches = []
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = {key: [encoded[key][sample] for sample in chosen] for key in encoded}
        inputs = dict(tokenizer.pad(rows, padding=True, return_tensors="pt"))
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        of_chosen = targets(inputs, [labels[sample] for sample in chosen])
        batches.append(Batch(inputs, of_chosen, torch.tensor(chosen)))
    return batches
