"""The ``study`` section: which allocations `layerlens evaluate` compares, and how they are trained."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from layerlens.config.base import Amount, ConfigModel
from layerlens.config.study_arms import MANIFEST, WRITTEN, written_arm
from layerlens.quantities import COUNT
from layerlens.registry import RANK_RULES, UTILITY_MODELS

SVD = "_svd"
"""Ending of an arm that has the ranks of the arm before it, and A from the mean gradient (gradient_svd)."""


def utility_arms() -> dict[str, str]:
    """Arm -> utility model. `uniform` is the rank rule, so the model of this name is the arm `even`."""
    return {"even" if name == "uniform" else name: name for name in UTILITY_MODELS}


def study_arms() -> tuple[str, ...]:
    """Every arm by name, as the registries have them; each may end in ``_svd``."""
    return tuple(dict.fromkeys((*RANK_RULES, EVA_INIT, ADALORA, *utility_arms())))


def without_svd(arm: str) -> str:
    """The arm whose ranks it has."""
    return arm if arm.startswith(f"{MANIFEST}:") else arm.removesuffix(SVD)


class StudyConfig(ConfigModel):
    """Fine-tunes that `layerlens evaluate` runs: every arm at every budget, each with its own learning rate."""

    arms: tuple[str, ...] = Field(
        default=("uniform", "auto", "eva", "adalora"),
        min_length=1,
        description="Allocations to compare: utility models (`auto`, `tempered_log`, `tempered_energy`, `tempered`, "
        "`signal`, `whitened`, `gradient`, `weighted`, `even` for the model `uniform`), published rank rules "
        "(`uniform`, the largest equal rank for all Linear layers; `uniform_qv`, for queries and values; `eva`, "
        "`eva_init` with its initialisation; `gora`; `adalora`; `gradient_norm` and `fisher_proportional`; `random`), "
        "and models and rules that you registered. Uniform LoRA on some layers, with the same number of parameters: "
        "`top:4` and `bottom:2` (blocks), `top:3:v+o` (kinds of their layers: `q`, `k`, `v`, `o`, `qkv`, `up`, `gate`, "
        "`down`, `attention`, `ffn`, roles, or patterns for names), `only:v+o` (of all blocks). `cheapest:0.95` is the "
        "choice of `objective: cheapest` that keeps this share (`cheapest:0.95:vram_gb`: with the least memory instead "
        "of step time), `manifest:PATH` the LoRA ranks of a manifest. With the ending `_svd` (`uniform_svd`), an arm's "
        "A starts from the mean gradient. `uniform` always runs, because gains are measured against it.",
    )
    budgets: tuple[Annotated[float, Amount(COUNT)], ...] = Field(
        default=(),
        description="Trainable parameters: values below 1 are shares of the model's parameters, other values are "
        "counts (`60000`, `60k`). Empty: `optimization.max_trainable_params`.",
    )
    learning_rates: tuple[float, ...] = Field(
        default=(1e-4, 2.5e-4, 6.3e-4, 1.6e-3, 4e-3),
        min_length=2,
        description="Learning rates that every arm tries; validation loss decides. If an end of the sweep is best, "
        "LayerLens extends it.",
    )
    seeds: int = Field(default=5, ge=2, description="Paired runs of every arm at its best learning rate.")
    sweep_seeds: int = Field(default=1, ge=1, description="Seeds used to choose the learning rate.")
    steps: int = Field(default=200, ge=4, description="Optimiser steps of each run.")
    batch_size: int = Field(default=16, ge=1, description="Samples in a step.")
    train_samples: int = Field(default=2048, ge=2, description="Training samples, including the calibration samples.")
    validation_samples: int = Field(default=256, ge=2, description="Samples used to choose learning rates.")
    test_samples: int = Field(default=512, ge=2, description="Samples used for the reported results.")
    arms_at_once: int = Field(
        default=16, ge=1, description="Runs to train together over one frozen model. More runs need more memory."
    )

    @field_validator("arms")
    @classmethod
    def _known_arms(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        for arm in arms:
            base = without_svd(arm)
            known = base in study_arms() and arm not in (f"{ADALORA}{SVD}", f"{EVA_INIT}{SVD}")
            if not known and written_arm(base) is None:
                raise ValueError(f"unknown arm {arm!r}; known: {', '.join((*study_arms(), *WRITTEN))}")
        return tuple(dict.fromkeys(("uniform", *arms)))

    @field_validator("budgets", "learning_rates")
    @classmethod
    def _positive(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if any(value <= 0.0 for value in values):
            raise ValueError("must be above 0")
        return tuple(sorted(set(values)))


ADALORA, EVA_INIT = "adalora", "eva_init"
"""Arms that are more than ranks: AdaLoRA takes them away while it trains, ``eva_init`` begins from EVA's components."""
