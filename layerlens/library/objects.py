"""``Objects``: the model, data and settings that a program passes to ``layerlens.plan``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Objects:
    """The arguments of ``layerlens.plan``, and what LayerLens found out about them.

    Args:
        model: a module, or a model's directory or hub name.
        data: see ``samples.take``; also the path of a file, or the name of a data set.
        task: name of the task; None: LayerLens guesses it.
        loss: (output, targets) -> the loss of each sample, [b], or one number for the batch.
        tokenizer: a tokenizer, an image processor or a transform.
        collator: function from a list of samples to a batch.
        new_head: see ``new_head_of``.
        trainer_loss: (model, batch of a trainer) -> loss, if ``data`` is a list of a trainer's batches.
        trainer_loss_name: name of that loss.
        batches_are_samples: True if each of these batches counts as one sample.
        notes: notes for the user.
        sentence: the modules after the transformer of a ``SentenceTransformer``.
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
