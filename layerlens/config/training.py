"""How a manifest is fine-tuned: optimiser, schedule, precision, evaluation, checkpoints."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from layerlens.config.base import ConfigModel

REPORTS: set[str] = {"report_to", "report_every"}
"""Settings that change nothing in what is trained."""


class TrainingConfig(ConfigModel):
    """How `layerlens train` fine-tunes the manifest's choice."""

    epochs: float = Field(default=3.0, gt=0, description="Passes over the training samples.")
    max_steps: int | None = Field(default=None, ge=1, description="Optimiser steps, instead of `epochs`.")
    max_train_hours: float | None = Field(
        default=None,
        gt=0,
        exclude_if=lambda hours: hours is None,
        description="Budget for the predicted hours of all optimiser steps. Divided by the number of steps, it limits "
        "the choice like `optimization.max_step_ms`.",
    )
    learning_rate: float = Field(default=5e-4, gt=0, description="Peak learning rate.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="How the learning rate decays to 0 after the warm-up; `constant` does not decay."
    )
    warmup_ratio: float = Field(default=0.06, ge=0, lt=1, description="Share of the steps for the warm-up.")
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="Optimiser.")
    weight_decay: float = Field(
        default=0.0, ge=0, description="Decoupled weight decay, not applied to biases and norms."
    )
    max_grad_norm: float = Field(default=1.0, ge=0, description="Clip gradients to this norm; 0: do not clip.")
    batch_size: int = Field(default=16, ge=1, description="Samples in a batch of one process.")
    gradient_accumulation: int = Field(default=1, ge=1, description="Batches in one optimiser step.")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="Precision of the forward and backward passes (autocast); trained weights stay float32. float16 "
        "scales the loss and needs a GPU.",
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        default=False,
        description="Recompute activations in the backward pass to save memory at the cost of time. true: in every "
        "block; auto: in as few blocks as the memory budget needs, the lowest first, chosen together with the ranks.",
    )
    store_prefix: Literal["auto"] | bool = Field(
        default=False,
        exclude_if=lambda stored: stored is False,
        description="Store the activations below the lowest adapted block in the first epoch, and skip the blocks "
        "below from then on. Losses agree up to rounding, steps are shorter, and the activations need disk space, "
        "which `train` announces. `auto`: if nothing below is random in training. `true`: disable dropout below from "
        "the first step on, and refuse the training if nothing can be stored.",
    )
    prefix_precision: Literal["model", "bfloat16"] = Field(
        default="model",
        exclude_if=lambda precision: precision == "model",
        description="Precision of stored activations: that of the model, or bfloat16, which halves the disk space for "
        "float32.",
    )
    train_samples: int | None = Field(default=None, ge=1, description="Maximum number of training samples.")
    eval_samples: int | None = Field(
        default=None, ge=1, description="Maximum number of samples from the test split, which training never sees."
    )
    eval_batch_size: int = Field(default=32, ge=1, description="Samples in an evaluation batch.")
    eval_every: int | None = Field(
        default=None, ge=1, description="Evaluate every this many optimiser steps; after every epoch when not given."
    )
    save_every: int | None = Field(
        default=None,
        ge=1,
        description="Save a checkpoint every this many optimiser steps; after every epoch when not given.",
    )
    metric: str | None = Field(
        default=None,
        description="Metric that decides which step is best; the task's own when not given (accuracy, pearson, "
        "perplexity, f1, entity_f1, map50_95 ...).",
    )
    keep_best: bool = Field(
        default=True, description="Return the weights of the best evaluation instead of the last step."
    )
    early_stopping_patience: int | None = Field(
        default=None, ge=1, description="Stop after this many evaluations without improvement."
    )
    early_stopping_threshold: float = Field(
        default=0.0, ge=0, description="Smallest change of the metric that counts as an improvement."
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        lt=2**31,
        description="Seed of the data order and of dropout; `runtime.seed` when not given. The manifest's own seed "
        "initialises new weights.",
    )

    report_to: tuple[str, ...] = Field(
        default=(),
        exclude_if=lambda names: not names,
        description="Tools that receive losses and metrics during training, through transformers' own callbacks: "
        "`wandb`, `mlflow`, `tensorboard`, `trackio`, `comet_ml` ...; `all`: every installed tool. Set the target in "
        "each tool's own environment variables.",
    )
    report_every: int = Field(
        default=1,
        ge=1,
        exclude_if=lambda every: every == 1,
        description="Report the training loss every this many optimiser steps.",
    )

    @field_validator("report_to", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """One name may stand alone, and ``none`` is nobody, as in transformers."""
        if isinstance(value, str):
            value = (value,)
        return () if value in (["none"], ("none",)) else value

    @model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
        if self.early_stopping_patience is not None and not self.keep_best:
            raise ValueError("early_stopping_patience needs keep_best: the last step is past the best one by design")
        return self
