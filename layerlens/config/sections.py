"""The whole configuration, and how a job runs: its output, device, processes, telemetry and trackers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from layerlens.config.base import ConfigModel
from layerlens.config.model_and_data import DataConfig, ModelConfig
from layerlens.config.optimization import MARGIN, SCORE, STEP, OptimizationConfig
from layerlens.config.profiling import ProfilingConfig
from layerlens.config.study import StudyConfig
from layerlens.config.training import TrainingConfig


class OutputConfig(ConfigModel):
    """Where the results go."""

    directory: str = Field(
        default="out", min_length=1, description="Directory for the results, relative to the configuration file."
    )


class RuntimeConfig(ConfigModel):
    """How the run uses this machine."""

    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of the data split, the head and the solver.")
    threads: int = Field(
        default=0,
        ge=0,
        description="CPU threads for torch, the kernels and the solver. 0: all cores, divided among the processes that "
        "torchrun started on this machine.",
    )
    device: Literal["cpu", "cuda"] = Field(
        default="cpu",
        description="Device for the model and the statistics. With `cuda`, activations and gradients never leave the "
        "GPU.",
    )
    cache_dir: str | None = Field(
        default=None,
        description="Directory of the sensitivity cache; by default $LAYERLENS_CACHE, or `layerlens` in the user's "
        "cache directory. Several processes must share it.",
    )
    saving_time_share: float = Field(
        default=0.05,
        gt=0,
        le=1,
        description="Maximum share of the measuring time spent on saving unfinished statistics to the cache, so that "
        "an interrupted run can continue. 1: save after every batch.",
    )


class DistributedConfig(ConfigModel):
    """Several processes for one run: `torchrun --nproc-per-node 2 -m layerlens run config.yaml`."""

    backend: Literal["auto", "gloo", "nccl"] = Field(
        default="auto",
        description="Backend for exchanging sums: `nccl` between GPUs, `gloo` on CPUs; `auto` follows `device`.",
    )
    sharding: Literal["none", "fsdp"] = Field(
        default="none",
        description="Whether every process holds the whole model (`none`) or a shard of every block's weights (`fsdp`: "
        "torch's FSDP2, which gathers one block at a time). Statistics are the same.",
    )
    timeout_s: float = Field(
        default=300.0,
        ge=1,
        description="Seconds that a process waits for the others to start, for a heartbeat of each, and for one sum. "
        "Processes send heartbeats however long measuring takes.",
    )


class TelemetryConfig(ConfigModel):
    """Metrics and traces of a job. LayerLens sends none unless you set an address here or in
    OTEL_EXPORTER_OTLP_ENDPOINT.

    If the collector or gateway cannot be reached, the job is delayed by at most a second and does not fail.
    """

    otlp_endpoint: str | None = Field(
        default=None,
        description="Base URL of an OpenTelemetry collector (OTLP over HTTP), such as http://localhost:4318; by "
        "default $OTEL_EXPORTER_OTLP_ENDPOINT. Put headers with secrets into $OTEL_EXPORTER_OTLP_HEADERS.",
    )
    push_gateway: str | None = Field(
        default=None,
        description="URL of a Prometheus push gateway. A batch job pushes its metrics there when it ends.",
    )
    job: str = Field(
        default="layerlens",
        min_length=1,
        description="Value of the `job` label at the push gateway, and the service name.",
    )

    @field_validator("otlp_endpoint", "push_gateway")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        return check_address(value)


class TrackingConfig(ConfigModel):
    """Experiment trackers for a job."""

    trackers: tuple[str, ...] = Field(
        default=(),
        description="Names of trackers: `mlflow`, `tensorboard`, `wandb`, or one that a package registers under the "
        "entry point `layerlens.trackers`.",
    )
    uri: str | None = Field(
        default=None,
        description="MLflow tracking server; by default $MLFLOW_TRACKING_URI. It must not contain a password.",
    )
    experiment: str = Field(
        default="layerlens", min_length=1, description="Experiment for the run; W&B calls it project."
    )
    run_name: str | None = Field(default=None, description="Name of the run; the tracker's choice when not given.")
    register_model: str | None = Field(
        default=None,
        description="Name under which MLflow's model registry, or W&B's artifacts, get the adapter as a new version.",
    )
    log_dir: str = Field(
        default="runs", min_length=1, description="Directory of TensorBoard's event files, and of W&B's."
    )
    tags: dict[str, str] = Field(default_factory=dict, description="Tags of the run.")

    @field_validator("uri")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        return check_address(value)


def check_address(value: str | None) -> str | None:
    """An http(s) URL without a password, since configurations are recorded.

    Raises:
        ValueError: it is something else; a password is not repeated.
    """
    if value is None:
        return None
    if not value.startswith(("http://", "https://")):
        raise ValueError(f"must begin with http:// or https://, got {value.partition('@')[2] or value!r}")
    if "@" in value.split("/")[2]:
        raise ValueError("must not hold a user or password; give credentials in the environment")
    return value


class RunConfig(ConfigModel):
    """The whole job: `layerlens run config.yaml`."""

    model: ModelConfig
    data: DataConfig
    profiling: ProfilingConfig = Field(default_factory=ProfilingConfig, description="What is measured.")
    optimization: OptimizationConfig = Field(description="Budgets, options and solver.")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="How the choice is fine-tuned.")
    output: OutputConfig = Field(default_factory=OutputConfig, description="Where the results go.")
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig, description="How the run uses this machine.")
    distributed: DistributedConfig = Field(
        default_factory=DistributedConfig, description="How several processes do one run together."
    )
    study: StudyConfig = Field(
        default_factory=StudyConfig, description="What `layerlens evaluate` compares; other commands do not read it."
    )
    telemetry: TelemetryConfig = Field(default_factory=TelemetryConfig, description="Metrics and traces.")
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="Experiment trackers.")

    def by_score(self) -> RunConfig:
        """The same job with the best score for its objective."""
        if self.optimization.objective == SCORE:
            return self
        changes = {"objective": SCORE, "quality_margin": MARGIN, "minimise": STEP}
        return self.model_copy(update={"optimization": self.optimization.model_copy(update=changes)})
