"""Who is told of a job: metrics and traces (``telemetry``), experiment trackers (``tracking``)."""

from __future__ import annotations

from pydantic import Field, field_validator

from layerlens.config.base import ConfigModel


class TelemetryConfig(ConfigModel):
    """Metrics and traces of a job. None is sent unless an address is given here or in OTEL_EXPORTER_OTLP_ENDPOINT.

    A collector or gateway that cannot be reached delays a job by a second at most and never fails it.
    """

    otlp_endpoint: str | None = Field(
        default=None,
        description="Base URL of an OpenTelemetry collector (OTLP over HTTP), such as http://localhost:4318; by "
        "default $OTEL_EXPORTER_OTLP_ENDPOINT. Headers with secrets belong into $OTEL_EXPORTER_OTLP_HEADERS.",
    )
    push_gateway: str | None = Field(
        default=None,
        description="URL of a Prometheus push gateway to which a batch job's metrics are pushed when it ends.",
    )
    job: str = Field(
        default="layerlens", min_length=1, description="Value of the `job` label at the push gateway, and service name."
    )

    @field_validator("otlp_endpoint", "push_gateway")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        return check_address(value)


class TrackingConfig(ConfigModel):
    """Experiment trackers that a job is logged to."""

    trackers: tuple[str, ...] = Field(
        default=(),
        description="Names of trackers: `mlflow`, `tensorboard`, or one that a package registers under the entry point "
        "`layerlens.trackers`.",
    )
    uri: str | None = Field(
        default=None, description="Tracking server of MLflow; by default $MLFLOW_TRACKING_URI. No password in it."
    )
    experiment: str = Field(default="layerlens", min_length=1, description="Experiment that the run belongs to.")
    run_name: str | None = Field(default=None, description="Name of the run; the tracker's choice when not given.")
    register_model: str | None = Field(
        default=None, description="Name under which MLflow's model registry gets the adapter as a new version."
    )
    log_dir: str = Field(default="runs", min_length=1, description="Directory of TensorBoard's event files.")
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
