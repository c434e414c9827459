"""What every baseline is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from layerlens.models import Choice, ModelFacts, ModelSpec

if TYPE_CHECKING:
    import torch

    from layerlens.tuning.training import Loss, TrainingHook


def model_loss(model: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """The loss that the model computes from the labels in the batch."""
    loss: torch.Tensor = model(**batch).loss
    return loss


@dataclass(frozen=True)
class BaselineRequest:
    """One comparison: the same for every baseline.

    Args:
        model: a freshly loaded base model; the baseline changes it in place.
        spec: its layers.
        facts: of the base model: task, head, fingerprint ...
        budget: trainable parameters, the task head not counted.
        batches: one epoch of training batches (model inputs with labels) in the run's order, for methods that look at
            the data before they train.
        total_steps: optimiser steps of the training to come.
        seed: of every new weight and every random choice.
        alpha_over_r: LoRA scale.
        learning_rate: of the training to come, for methods that train before it.
        loss: mean loss of a batch.
    """

    model: torch.nn.Module
    spec: ModelSpec
    facts: ModelFacts
    budget: int
    batches: Sequence[Mapping[str, Any]] = ()
    total_steps: int = 0
    seed: int = 0
    alpha_over_r: float = 2.0
    learning_rate: float = 5e-4
    loss: Loss = model_loss


@dataclass(frozen=True)
class Finished:
    """A model after training, as it is evaluated and saved.

    Args:
        model: for ``layerlens.tuning.save``.
        kept_params: parameters that were added or changed, the task head not counted.
        choice: what is in the model, where a choice can say it.
    """

    model: torch.nn.Module
    kept_params: int
    choice: Choice | None


@dataclass(frozen=True)
class Prepared:
    """A model ready to train.

    Args:
        model: everything that trains requires gradients.
        trained_params: parameters that require gradients, the task head not counted.
        choice: what is in the model, where a choice can say it.
        hooks: to be called around every optimiser step.
        finish: to be called once after training.
        note: what a reader of the comparison should know, one line.
    """

    model: torch.nn.Module
    trained_params: int
    choice: Choice | None
    finish: Callable[[torch.nn.Module], Finished]
    hooks: tuple[TrainingHook, ...] = ()
    note: str = field(default="")
