"""The ``optimization.proxy_check`` section: complete allocations that are trained before one of them is written."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from layerlens.config.base import ConfigModel
from layerlens.config.names import RegisteredName
from layerlens.registry import UTILITY_MODELS

UNIFORM_LORA = "uniform-lora"
CandidateName = Annotated[str, RegisteredName(UTILITY_MODELS, others=(UNIFORM_LORA,))]


class ProxyCheckConfig(ConfigModel):
    """Training of the solver's choice against other allocations within the same budgets; the best one is written.

    All start from the same weights and see the same batches; they are compared on samples that none was trained on, and
    that are never those of the test split. Each candidate counts at the best of its learning rates, and uniform LoRA is
    kept where the others' loss drop is not at least 2 % larger.
    """

    steps: int = Field(
        default=0,
        ge=0,
        description="Training steps of every candidate, with warm-up and decay of their own; 0: no check, the solver's "
        "choice is written. In our study as many as half of the later fine-tune kept most of the gain, a quarter half "
        "of it. The check costs candidates × learning_rates × steps.",
    )
    candidates: tuple[CandidateName, ...] = Field(
        default=(UNIFORM_LORA, "tempered_energy", "tempered_log"),
        min_length=1,
        description="What is trained beside the solver's choice: `uniform-lora` (the largest equal LoRA rank on all "
        "layers that the budgets allow, what is left spread over the depth), and choices by other utility models. What "
        "is the solver's choice too is trained once.",
    )
    learning_rates: tuple[float, ...] = Field(
        default=(1e-3,), min_length=1, description="Peak learning rates of AdamW; each candidate counts at its best."
    )
    train_samples: int = Field(
        default=1024, ge=8, description="Samples to train on; calibration samples are among them."
    )
    held_out_samples: int = Field(default=256, ge=8, description="Samples whose loss is compared.")

    @field_validator("learning_rates")
    @classmethod
    def _positive(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0.0 < rate < float("inf") for rate in rates):
            raise ValueError("must be finite and above 0")
        return tuple(sorted(set(rates)))

    @field_validator("candidates")
    @classmethod
    def _each_once(cls, candidates: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(candidates))
