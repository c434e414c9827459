"""What a program gives to plan on: its model, its data, and how they belong together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Objects:
    """What a program gives.

    Args:
        model: a module, or a model's directory or name.
        data: see ``samples.take``; a file's path or a name too.
        task: what the model is tuned for; guessed when None.
        loss: (output, targets) -> the loss of each sample, or one for the batch.
        tokenizer: tokenizer, or image processor or transform.
        collator: from a list of samples to a batch.
        new_head: see ``new_head_of``.
        trainer_loss: (model, batch of a trainer) -> its loss, where ``data`` is a list of a trainer's batches.
        trainer_loss_name: what that loss is called.
        batches_are_samples: whether each of these batches is one sample.
        notes: what is known already that the user should know.
        sentence: the modules after the transformer of a SentenceTransformer.
    """

    model: Any
    data: Any = None
    task: str | None = None
    loss: Callable[..., Any] | None = None
    tokenizer: Any = None
    collator: Callable[[list[Any]], Any] | None = None
    new_head: bool | Sequence[str] | None = None
    trainer_loss: Callable[[torch.nn.Module, Any], torch.Tensor] | None = None
    trainer_loss_name: str = ""
    batches_are_samples: bool = False
    notes: tuple[str, ...] = ()
    sentence: Any = None
