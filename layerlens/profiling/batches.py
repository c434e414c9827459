"""Calibration samples as padded batches of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Batch:
    """Some calibration samples.

    Args:
        inputs: what the model takes, each [b, t].
        labels: int64 [b].
        index: int64 [b], position of each sample in the calibration set.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    index: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        """[b, t], 1 for tokens and 0 for padding."""
        return self.inputs["attention_mask"]


def make_batches(
    tokenizer: Any, texts: Sequence[str], labels: Sequence[int], *, max_length: int, batch_size: int
) -> list[Batch]:
    """Batches of texts of like length, longest last, so that little is padding.

    Args:
        tokenizer: a transformers tokenizer.
        texts, labels: the samples.
        max_length: longest sequence, in tokens; longer ones are truncated.
        batch_size: samples in a batch.
    """
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    order = sorted(range(len(texts)), key=lambda sample: (lengths[sample], sample))
    batches = []
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = {key: [encoded[key][sample] for sample in chosen] for key in encoded}
        inputs = dict(tokenizer.pad(rows, padding=True, return_tensors="pt"))
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        batches.append(Batch(inputs, torch.tensor([labels[sample] for sample in chosen]), torch.tensor(chosen)))
    return batches
