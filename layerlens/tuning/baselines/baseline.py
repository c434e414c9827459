"""A baseline: another way to spend the same parameters, what it is given and gives back, and all of them by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from layerlens.models import Choice, ModelFacts, ModelSpec
from layerlens.registry import RANK_RULES, Registry

if TYPE_CHECKING:
    import torch

    from layerlens.tuning.fine_tune import Loss, TrainingHook


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


@dataclass(frozen=True)
class Baseline:
    """One way to spend a budget.

    Args:
        summary: one line for lists.
        prepare: makes the request's model ready to train. It raises ConfigurationError where the model or the budget
            does not allow it, or where what it needs was not given.
    """

    summary: str
    prepare: Callable[[BaselineRequest], Prepared]


class BaselineRegistry(Registry[Baseline]):
    """Baselines by name; every rank rule that has no baseline of its own is one, under its own name."""

    def names(self) -> tuple[str, ...]:
        """The baselines' names, then those of rank rules."""
        own = super().names()
        return (*own, *(name for name in RANK_RULES if name not in own and name not in OWN_NAMES))

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in RANK_RULES

    def __getitem__(self, name: str) -> Baseline:
        if super().__contains__(name) or name not in RANK_RULES:
            return super().__getitem__(name)
        made: Baseline = importlib.import_module(f"{PLACE}.measured").of_rule(name)
        return made


PLACE = "layerlens.tuning.baselines"
OWN_NAMES = {"uniform": "uniform-lora", "uniform_qv": "lora-qv"}
"""Rank rules whose baseline is called otherwise."""
BASELINES = BaselineRegistry(
    "baseline",
    PLACE,
    {
        "full": f"{PLACE}.plain:FULL",
        "head-only": f"{PLACE}.plain:HEAD_ONLY",
        "uniform-lora": f"{PLACE}.measured:UNIFORM_LORA",
        "lora-qv": f"{PLACE}.measured:LORA_QV",
        "rslora": f"{PLACE}.measured:RSLORA",
        "adalora": f"{PLACE}.cut:ADALORA",
        "eva": f"{PLACE}.measured:EVA",
        "autolora": f"{PLACE}.autolora:AUTOLORA",
        "adapter-only": f"{PLACE}.plain:ADAPTER_ONLY",
        "prefix-only": f"{PLACE}.plain:PREFIX_ONLY",
        "truncation": f"{PLACE}.cut:TRUNCATION",
        "hypernetwork": f"{PLACE}.plain:HYPERNETWORK",
    },
)
"""The built-in ones; a package adds one by an entry point of this group, a rank rule by one of its own kind."""


def known_baseline(name: str) -> Baseline:
    """The baseline of this name.

    Raises:
        ConfigurationError: there is none; the message has the nearest name and all known ones.
    """
    return BASELINES[name]
