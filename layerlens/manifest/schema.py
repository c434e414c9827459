"""The form of a manifest file, as pydantic models: what is read is checked here, and the JSON Schema comes from here.

The models mirror the nouns in ``layerlens.models.manifest`` and add what only a file has: a schema version and the
time it was written. Unknown keys are refused, so that a misspelt field is found instead of ignored.
"""

from __future__ import annotations

import math
import re
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from layerlens.exceptions import ManifestError
from layerlens.models.manifest import SCHEMA_VERSION

SCHEMA_ID = f"urn:layerlens:manifest:{SCHEMA_VERSION}"
UTC_TIME = r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d{1,6})?(Z|\+00:00)$"


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("number", "Input should be a number")
    return value


def _utc(value: str) -> str:
    if not re.fullmatch(UTC_TIME, value):
        raise PydanticCustomError("utc", "Input should be an ISO 8601 time in UTC such as 2026-01-31T12:00:00Z")
    datetime.fromisoformat(value.replace("Z", "+00:00"))  # a ValueError says which part is out of range
    return value


# Text such as "1e-4" counts as a number: PyYAML reads that spelling as text.
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
UtcTime = Annotated[str, AfterValidator(_utc), Field(json_schema_extra={"pattern": UTC_TIME})]
Whole = Annotated[int, Field(strict=True, ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class AllocationEntry(_Part):
    """What was chosen for one layer."""

    model_config = ConfigDict(
        extra="forbid",
        protected_namespaces=(),
        json_schema_extra={
            "if": {"properties": {"method": {"const": "none"}}},
            "then": {"properties": {"rank": {"const": 0}}},
            "else": {"properties": {"rank": {"minimum": 1}}},
        },
    )

    layer: str = Field(min_length=1, description="Module path of the layer.")
    method: Literal["none", "lora", "adapter", "prefix"] = Field(description="PEFT method.")
    rank: Whole = Field(
        description="LoRA rank, adapter bottleneck width or number of prefix pairs; 0 exactly for method none."
    )
    utility: Number = Field(description="Expected gain, in `utility_unit`.")
    cost: Whole = Field(description="Trainable parameters.")
    flops: Number = Field(description="Forward FLOPs added for one batch.")
    vram: Number = Field(description="Training memory added, GB (1e9 bytes).")
    latency: Number = Field(description="Forward latency added for one batch, ms.")
    total_score: Number = Field(description="What the solver maximised: weighted utility minus costs and penalty.")

    @model_validator(mode="after")
    def _rank_fits_method(self) -> AllocationEntry:
        if (self.rank == 0) != (self.method == "none"):
            fields = {"rank": self.rank, "method": self.method, "need": "0" if self.method == "none" else "1 or more"}
            raise PydanticCustomError("rank", "rank {rank} does not fit method '{method}', which needs {need}", fields)
        return self


class ResourceEntry(_Part):
    """One budget and its use; `total` = `base` + `added` is what the budget limits."""

    resource: str = Field(
        min_length=1,
        description="trainable_params, flops, vram_gb, latency_ms, a resource of the user, or layers_without_METHOD "
        "(where the configuration asks for a least number of layers with a method).",
    )
    budget: Number | None = Field(description="What was allowed; null for no limit.")
    base: Number = Field(description="What the frozen model uses.")
    added: Number = Field(description="What the chosen options add.")
    total: Number = Field(description="base + added.")
    multiplier: Number = Field(description="Shadow price: score per unit of the resource.")
    source: str = Field(description="How the costs were found.")


class ManifestDocument(_Part):
    """Which layers of a model to adapt, with which PEFT method and rank, and how good that choice provably is."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), title="LayerLens manifest")

    schema_version: Literal["1.0"] = Field(description="Version of this form.")
    created_at: UtcTime = Field(description="When it was written, ISO 8601 in UTC; the only timestamp.")
    model: dict[str, JsonValue] = Field(description="Name, fingerprint, size, task and labels of the base model.")
    allocations: list[AllocationEntry] = Field(description="One row for each layer, in the order of the model.")
    resources: list[ResourceEntry] = Field(description="One row for each resource.")
    score: Number = Field(description="Sum of total_score: the value of the allocation.")
    upper_bound: Number = Field(description="No allocation within the budgets has a larger score (proved).")
    gap: Number = Field(ge=0, description="(upper_bound - score) / |upper_bound|.")
    status: Literal["optimal", "feasible"] = Field(description="optimal: the gap is within the tolerance (proved).")
    solver: str = Field(description="Which solver stages ran.")
    utility_model: str = Field(description="Which utility model made the utilities.")
    utility_unit: str = Field(description="What utilities are measured in.")
    lora: dict[str, JsonValue] = Field(description="alpha_over_r (one constant for the model) and init of LoRA.")
    predicted: dict[str, JsonValue] = Field(description="Predicted gain and what it rests on.")
    provenance: dict[str, JsonValue] = Field(description="Fingerprints, versions, configuration, seed.")

    @model_validator(mode="after")
    def _each_once(self) -> ManifestDocument:
        _refuse_repeats("allocations: layer", [row.layer for row in self.allocations])
        _refuse_repeats("resources: resource", [row.resource for row in self.resources])
        return self

    @model_validator(mode="after")
    def _finite_values(self) -> ManifestDocument:
        for name in ("model", "lora", "predicted", "provenance"):
            _refuse_not_finite(getattr(self, name), name)
        return self


def _refuse_repeats(kind: str, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise PydanticCustomError("repeated", "{kind} '{name}' is there twice", {"kind": kind, "name": name})
        seen.add(name)


def _refuse_not_finite(value: Any, place: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise PydanticCustomError(
            "finite", "{place} is {value}, not a finite number", {"place": place, "value": str(value)}
        )
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        _refuse_not_finite(part, f"{place}.{key}")


def check_document(data: Any, source: str) -> ManifestDocument:
    """``data``, as JSON or YAML gave it, as a checked document.

    Raises:
        ManifestError: one line for every wrong field, each with its path, what is wrong, and what came.
    """
    if not isinstance(data, dict):
        raise ManifestError(f"{source}: a manifest is a mapping of fields, got {type(data).__name__}")
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        came = "none" if version is None else repr(version)
        raise ManifestError(f"{source}: schema_version: this LayerLens reads version {SCHEMA_VERSION!r}, got {came}")
    try:
        return ManifestDocument.model_validate(data)
    except ValidationError as error:
        raise ManifestError("\n".join(f"{source}: {problem}" for problem in _problems(error))) from error


def _problems(error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors(include_url=False):
        place = ""
        for part in problem["loc"]:
            place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
        came = repr(problem["input"])
        too_long = problem["type"] == "missing" or len(came) > 80
        lines.append((f"{place}: " if place else "") + problem["msg"] + ("" if too_long else f", got {came}"))
    return lines


def manifest_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of manifest.json, as published in docs/manifest.schema.json."""
    schema = ManifestDocument.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID, **schema}
