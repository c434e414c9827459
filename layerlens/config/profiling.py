"""What is measured, and how it becomes a utility: the section ``profiling``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from layerlens.config.base import ConfigModel, StatisticName, UtilityName

METRICS = ("gradient_energy", "fisher", "proxy_eval")


class ProxyConfig(ConfigModel):
    """Short real training of a few options, which turns utilities into predicted drops in loss and checks them.

    Each option is trained alone, from the same weights and on the same batches, and evaluated on held-out samples.
    """

    options: int = Field(
        default=0,
        ge=0,
        description="How many options to train, spread evenly over methods, roles, depths and ranks. 0: none, and the "
        "utilities stay uncalibrated. At least 4; 24 is a good start.",
    )
    steps: int = Field(default=16, ge=1, description="Training steps of each option.")
    learning_rate: float = Field(default=1e-3, gt=0, description="Learning rate of AdamW in these steps.")
    held_out_samples: int = Field(
        default=128,
        ge=8,
        description="Held-out samples for comparing losses; they are neither measured nor trained on.",
    )
    time_limit_s: float | None = Field(
        default=None,
        gt=0,
        description="LayerLens starts no further option after this many seconds. It uses the finished options, and a "
        "later run continues.",
    )

    @field_validator("options")
    @classmethod
    def _enough_to_fit(cls, options: int) -> int:
        if 0 < options < 4:
            raise ValueError("must be 0 or at least 4, the fewest that a curve can be fitted to")
        return options


class ProfilingConfig(ConfigModel):
    """What to measure, and how to turn it into a utility."""

    utility_model: UtilityName = Field(
        default="auto",
        description="Model that turns statistics into a utility curve: `auto` (`tempered_energy` if the parameter "
        "budget is below rank 2 on every layer, else `tempered_log`), `tempered_log` (fourth root of the gradient "
        "energy times the parameters of a rank times log(1 + rank): ranks become more equal as the budget grows), "
        "`tempered_energy` (the fourth root times the square root of the rank: the geometric mean of `gradient` and "
        "`uniform`), `tempered` (the same without the sampling noise in the energy), `signal` (square root of the "
        "noise-corrected energy times the square root of the rank), `whitened` (K-FAC-whitened split-half spectrum, in "
        "nats), `gradient` (plain gradient energy), `weighted` (`metric_weights` over layers), `uniform` (every layer "
        "equal).",
    )
    metric_weights: dict[str, float] = Field(
        default_factory=lambda: {"gradient_energy": 0.5, "fisher": 0.5},
        description="Weight of each metric in the `weighted` utility and in `run_pipeline`: gradient_energy, fisher, "
        "proxy_eval. LayerLens scales the weights to sum 1, and leaves out a metric that no layer has, with a "
        "warning.",
    )
    statistics: tuple[StatisticName, ...] = Field(
        default=(),
        description="Statistics to measure in addition to those that the utility model needs: `fisher` (trace of the "
        "empirical Fisher), `gradient` (energy of the mean gradient), `input_scale`, `spectrum` (split-half spectrum "
        "of the mean gradient), `whitened_spectrum` (the same, K-FAC-whitened), `factors` (the K-FAC factors "
        "themselves; large), `sketched_spectrum` and `sketched_factors` (by random projections, with their errors), "
        "`ntk` (Gram matrix of per-sample gradients, its effective rank and target alignment), `fisher_diagonal` "
        "(importance of single weights: mean, quantiles, participation, sums for each output), and for every module "
        "`activation_memory`, `flops` and `time`. LayerLens computes only what is needed or listed here.",
    )
    ntk_samples: int = Field(
        default=64,
        ge=2,
        le=8192,
        description="Samples for the neural tangent kernel. Up to 256 samples it is exact, and needs memory for "
        "activations and gradients: samples × tokens × (inputs + outputs of every layer) × 4 bytes. Beyond, LayerLens "
        "uses random projections of 4 kB per sample and reports their error.",
    )
    layers: tuple[str, ...] = Field(
        default=(),
        exclude_if=lambda layers: not layers,
        description="Measure and offer only these layers: patterns with `*` and `?` for whole names, or for the part "
        "after a dot. `[language_model.*]` selects the language tower; `[layers.*, lm_head, embed_tokens]` adds the "
        "output layer and the embeddings to the blocks, if their weights are not tied. When not given: all layers of "
        "the blocks.",
    )
    all_weights: bool = Field(
        default=False,
        description="Also measure the weights outside the layers (embeddings, convolutions, heads), and list those "
        "left out. They go into the statistics file, and no option is offered for them.",
    )
    adapter_sites: Literal["residual", "all"] = Field(
        default="residual",
        description="Where adapters can go: after the modules that write to the residual stream (attention output, FFN "
        "output), or after every Linear.",
    )
    memory_mode: Literal["auto", "plain", "checkpointed", "streamed"] = Field(
        default="auto",
        description="How to hold the model in memory while measuring: `plain` (in memory), `checkpointed` (in memory; "
        "blocks keep only their inputs and run again in the backward pass), `streamed` (weights stay in their "
        "safetensors files and blocks are loaded one at a time; for transformers models with one stack of blocks), "
        "`auto` (the first of these that is predicted to stay within `max_memory_gb`; `plain` without a limit). All "
        "give the same statistics.",
    )
    max_memory_gb: float | None = Field(
        default=None,
        gt=0,
        description="Limit on resident memory of the whole process while profiling, GB (1e9 bytes), for `memory_mode: "
        "auto`. It does not limit later training.",
    )
    proxies: ProxyConfig = Field(
        default_factory=ProxyConfig, description="Short real training of a few options, to calibrate the utilities."
    )

    @property
    def limits_memory(self) -> str | None:
        """The key that limits the memory of profiling, with its section; None where nothing does."""
        if self.memory_mode == "auto":
            return None if self.max_memory_gb is None else "profiling.max_memory_gb"
        return None if self.memory_mode == "plain" else "profiling.memory_mode"

    @field_validator("metric_weights")
    @classmethod
    def _known_and_positive(cls, weights: dict[str, float]) -> dict[str, float]:
        for name, weight in weights.items():
            if name not in METRICS:
                raise ValueError(f"unknown metric {name!r}; known: {', '.join(METRICS)}")
            if not 0.0 <= weight < float("inf"):
                raise ValueError(f"weight of {name!r} must be a finite number >= 0, got {weight!r}")
        if not sum(weights.values()) > 0.0:
            raise ValueError("at least one weight must be above 0")
        return weights
