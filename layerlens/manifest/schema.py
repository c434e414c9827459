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
from pydantic_core import ErrorDetails, PydanticCustomError

from layerlens import vocabulary
from layerlens.config import RunConfig
from layerlens.config.base import ChosenMethod, must_be, nearest_choice, nearest_key
from layerlens.exceptions import ManifestError
from layerlens.faults import ManifestFault
from layerlens.models import LORA_KINDS, RESOURCES
from layerlens.models.manifest import SCHEMA_VERSION

SCHEMA_ID = f"urn:layerlens:manifest:{SCHEMA_VERSION}"
UTC_TIME = r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d{1,6})?(Z|\+00:00)$"


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("number", "must be a number")
    return value


def _utc(value: str) -> str:
    if not re.fullmatch(UTC_TIME, value):
        raise PydanticCustomError("utc", "must be an ISO 8601 time in UTC such as 2026-01-31T12:00:00Z")
    datetime.fromisoformat(value.replace("Z", "+00:00"))  # a ValueError says which part is out of range
    return value


# Text such as "1e-4" counts as a number: PyYAML reads that spelling as text.
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
UtcTime = Annotated[str, AfterValidator(_utc), Field(json_schema_extra={"pattern": UTC_TIME})]
Whole = Annotated[int, Field(strict=True, ge=0)]
Text = Annotated[str, Field(strict=True)]

ROUNDING = 1e-12  # relative: a sum of whole numbers in float64, exact below 1e12
MOST_PARAMETERS = 2**63
SCORE_TOLERANCE = 1e-6  # relative: sums of the solver and of a reader add up in different orders


def _recorded_config(value: dict[str, Any]) -> dict[str, Any]:
    for name in RunConfig.model_fields:
        if not isinstance(value.get(name, {}), dict | None):
            message = "{name} must be a section of settings, got {value}"
            raise PydanticCustomError("section", message, {"name": name, "value": repr(value[name])[:80]})
    return value


def _recorded_data(value: dict[str, Any]) -> dict[str, Any]:
    for name, kind, said in _DATA_FACTS:
        if name in value and (not isinstance(value[name], kind) or isinstance(value[name], bool)):
            message = "{name} must be {said}, got {value}"
            raise PydanticCustomError("fact", message, {"name": name, "said": said, "value": repr(value[name])[:80]})
    return value


_DATA_FACTS = (
    ("source", str, "a text"), ("calibration", str, "a fingerprint"), ("calibration_samples", int, "a whole number"),
    ("head", str | None, "a fingerprint"), ("head_samples", int | None, "a whole number"),
    ("key", str, "a fingerprint"),
)  # fmt: skip
RecordedConfig = Annotated[dict[str, JsonValue], AfterValidator(_recorded_config)]
RecordedData = Annotated[dict[str, JsonValue], AfterValidator(_recorded_data)]
_NEEDED = [name for name, resource in vocabulary.RESOURCES.items() if resource.always]


def _with_resource(name: str) -> dict[str, Any]:
    """JSON Schema of a list that has exactly one row for the resource."""
    row = {"type": "object", "properties": {"resource": {"const": name}}, "required": ["resource"]}
    return {"contains": row, "minContains": 1, "maxContains": 1}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class AllocationEntry(_Part):
    """The choice for one layer."""

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
    method: ChosenMethod = Field(description="PEFT method.")
    rank: Whole = Field(
        description="LoRA rank, width of the adapter's bottleneck, or number of prefix pairs; 0 if and only if the "
        "method is none."
    )
    utility: Number = Field(description="Expected gain, in `utility_unit`.")
    cost: Whole = Field(description="Number of trainable parameters.")
    flops: Number = Field(description="Forward FLOPs added to one batch.")
    vram: Number = Field(description="Training memory added, in GB (1e9 bytes).")
    latency: Number = Field(description="Forward latency added to one batch, in milliseconds.")
    total_score: Number = Field(
        description="Score that the solver maximised: weighted utility minus costs and penalty."
    )

    @model_validator(mode="after")
    def _rank_fits_method(self) -> AllocationEntry:
        if (self.rank == 0) != (self.method == "none"):
            fields = {"rank": self.rank, "method": self.method, "need": "0" if self.method == "none" else "1 or more"}
            raise PydanticCustomError("rank", "rank {rank} does not fit method '{method}', which needs {need}", fields)
        return self


class ResourceEntry(_Part):
    """One budget and its use. The budget limits `total` = `base` + `added`."""

    resource: str = Field(
        min_length=1,
        description="trainable_params, flops, vram_gb, latency_ms, a custom resource, or layers_without_METHOD "
        "(if the configuration sets a minimum number of layers with a method).",
    )
    budget: Number | None = Field(description="The budget; null for no limit.")
    base: Number = Field(description="Amount that the frozen model uses.")
    added: Number = Field(description="Amount that the chosen options add.")
    total: Number = Field(description="base + added.")
    multiplier: Number = Field(description="Shadow price: score per unit of the resource.")
    source: str = Field(description="How LayerLens found the costs.")


class _OpenPart(BaseModel):
    """Known fields, which are checked, and any other fields that a writer adds."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)


class ModelEntry(_OpenPart):
    """The base model: what is needed to load and to recognise it. A writer without the model leaves fields out."""

    name_or_path: Text = Field(default="", description="Directory, hub name or package:NAME.")
    fingerprint: Text = Field(default="", description="SHA-256 of the weights.")
    total_params: Whole = Field(default=0, description="Number of parameters of the base model.")
    task: Text = Field(default="", description="Task to fine-tune for.")
    dtype: Literal["", "float32", "bfloat16", "float16"] = Field(
        default="", description="Precision of the measured weights, which the fingerprint is of."
    )
    num_labels: Whole = Field(default=0, description="Number of classes.")
    labels: list[Text] = Field(default=[], description="Name of each class, in the order of the logits.")
    head_modules: list[Text] = Field(default=[], description="Module paths of the task head, which is trained in full.")
    model_type: Text = Field(default="", description="model_type in transformers.")
    weights: Text | None = Field(default=None, description="File of weights that the configuration names.")
    loss: Text | None = Field(default=None, description="Loss function that the configuration names.")
    left_out: dict[str, str] | None = Field(
        default=None, description="Layers that no method can adapt, with the reason."
    )
    quantization: dict[str, Any] | None = Field(
        default=None, description="Quantization of the loaded weights, as arguments of transformers."
    )
    new_parameters: list[Text] | None = Field(
        default=None,
        description="Parameters outside head_modules that the checkpoint lacks. They keep their random initialisation.",
    )
    tokens: dict[str, Any] | None = Field(
        default=None,
        description="Embedding rows that are trained: how (trainable_token_indices or modules_to_save), their "
        "indices and modules, the number of rows, and the shapes in the checkpoint of the resized tensors.",
    )
    parameters: dict[str, Any] | None = Field(
        default=None,
        description="Sums of the parameters: offered (in layers that can be adapted), head (trained in full), and "
        "left_out, by reason.",
    )


class LoraEntry(_OpenPart):
    """Scale and initialisation of LoRA layers; required if a layer has LoRA."""

    alpha_over_r: Number | None = Field(default=None, gt=0, description="LoRA scale alpha/r of every layer.")
    use_rslora: Annotated[bool, Field(strict=True)] = Field(
        default=False,
        description="Scale by alpha/√r, with alpha = alpha_over_r times the largest rank for every layer (rsLoRA).",
    )
    initialization: Literal["default", "pca", "gradient_svd"] = Field(
        default="default",
        description="Initialisation of A, with B = 0: default (uniform), pca (principal components of the layer's "
        "inputs), gradient_svd (right singular vectors of its mean gradient). The last two are in the "
        "exported peft directory.",
    )
    generator: Text = Field(
        default="", description="Generator that computes A and B during training (layerlens.generators)."
    )


class RankingEntry(_Part):
    """How well the utilities ranked the measured gains."""

    options: Whole = Field(description="Options compared.")
    spearman: Number | None = Field(description="Rank correlation; null where either is constant.")
    spearman_interval: tuple[Number, Number] | None = Field(description="Its 95 % bootstrap interval.")


class CalibrationEntry(_Part):
    """Results of the trained proxies."""

    proxies: Whole = Field(description="Number of trained options.")
    planned: Whole = Field(description="Number of planned options.")
    steps: Whole = Field(description="Steps of each training.")
    learning_rate: Number = Field(description="Learning rate of each training.")
    held_out_samples: Whole = Field(description="Number of held-out samples.")
    base_loss: Number = Field(description="Mean loss of the frozen model on the held-out samples.")
    mean_standard_error: Number = Field(description="Mean standard error of the measured gains.")
    leave_one_out_rmse: Number = Field(description="Error of an option that is predicted from the others, per sample.")
    options: Whole = Field(description="Options compared.")
    spearman: Number | None = Field(description="Rank correlation; null where either is constant.")
    spearman_interval: tuple[Number, Number] | None = Field(description="Its 95 % bootstrap interval.")
    by_method: dict[str, RankingEntry] = Field(description="The same for each method.")
    curves: dict[str, list[list[Number]]] = Field(description="Knots (utility, loss drop) by method.")


class SavingEntry(_Part):
    """Result of `objective: cheapest`, compared with uniform LoRA."""

    minimised: dict[str, Number] = Field(description="Weight of each resource; they sum to 1.")
    asked_share: Number = Field(description="Minimum share of uniform LoRA's improvement to keep.")
    kept_share: Number = Field(description="Share that the cheapest choice is predicted to keep.")
    cost_share: Number = Field(description="Cost of the cheapest choice, as a share of uniform LoRA's.")
    least_cost_share: Number = Field(description="Proved lower bound of the cost of any choice that keeps as much.")
    saves: bool = Field(
        description="True if the cheapest choice is written. Otherwise uniform LoRA, or the check's choice, is."
    )
    reason: Text = Field(description="Why the cheapest choice is not written; empty if it is.")
    law: Number = Field(description="The gain of a set is the sum of its utilities to this power.")
    price: Number = Field(description="Cost per unit of the sum of utilities, as shares of uniform LoRA's.")
    uniform_lora: dict[str, Number] = Field(description="Amounts that uniform LoRA uses, by resource.")
    measured: dict[str, Number] | None = Field(
        default=None,
        description="Share of uniform LoRA's held-out loss drop when both were trained: kept, with its 95 % interval "
        "kept_low to kept_high, and asked, the required share.",
    )
    written: Literal["cheapest", "uniform-lora", "score"] = Field(description="Which choice is written.")
    kept_interval: tuple[Number, Number] | None = Field(
        default=None,
        description="Range of the kept share in nine of ten cases of the study; null if it was not measured.",
    )


class RankEntry(_Part):
    """The choice compared with LoRA of rank 32 on every layer."""

    share: Number = Field(description="Share of its predicted gain that the choice has.")
    trainable_params: Number = Field(gt=0, description="Its number of trainable parameters.")
    low: Number | None = Field(default=None, description="Lower end of the share's 95 % interval.")
    high: Number | None = Field(default=None, description="Upper end of the share's 95 % interval.")


class PredictedEntry(_OpenPart):
    """The predicted gain of the choice."""

    gain: Number | None = Field(default=None, description="Sum over the chosen options, in `unit`.")
    gain_interval: tuple[Number, Number] | None = Field(default=None, description="Its 95 % interval.")
    unit: Text | None = Field(default=None, description="Unit of the gain.")
    calibrated: bool | None = Field(default=None, description="True if proxies were trained.")
    calibration: CalibrationEntry | None = Field(default=None, description="Results of the proxies.")
    uniform_lora: dict[str, Number] | None = Field(
        default=None,
        description="Amounts that uniform LoRA with as many parameters would use, by resource, if a step was recorded.",
    )
    cheapest: SavingEntry | None = Field(default=None, description="Result of `objective: cheapest`.")
    rank_32: RankEntry | None = Field(
        default=None,
        description="The choice compared with LoRA of rank 32 on every layer. `low` and `high` are there if proxies "
        "were trained.",
    )


class ProvenanceEntry(_OpenPart):
    """Fingerprints, versions and configuration behind the figures."""

    seed: Whole | None = Field(
        default=None, description="Random seed of every new weight; required if a layer is adapted."
    )
    config: RecordedConfig | None = Field(default=None, description="Configuration of the run.")
    threads: Whole | None = Field(default=None, description="Number of threads.")
    statistics: RecordedData | None = Field(default=None, description="Identity of the data and of the statistics.")
    versions: dict[str, str] | None = Field(default=None, description="Versions of the packages.")
    memory_mode: Text | None = Field(default=None, description="How the model was measured within a memory limit.")
    memory_mode_why: Text | None = Field(default=None, description="Reason for the memory mode.")
    proxy_check: dict[str, JsonValue] | None = Field(default=None, description="Result of the proxy check.")


class ManifestDocument(_Part):
    """Which layers of a model to adapt, with which PEFT method and rank, and the proof of how good this choice is."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), title="LayerLens manifest")

    schema_version: Literal["1.0"] = Field(description="Version of this format.")
    created_at: UtcTime = Field(description="Time of writing, ISO 8601 in UTC. This is the only timestamp.")
    model: ModelEntry = Field(description="Name, fingerprint, size, task and labels of the base model.")
    allocations: list[AllocationEntry] = Field(
        min_length=1, description="One row for each layer, in the order of the model."
    )
    resources: list[ResourceEntry] = Field(
        description=f"One row for each resource: {', '.join(RESOURCES)}, and custom resources.",
        json_schema_extra={"allOf": [_with_resource(name) for name in _NEEDED]},
    )
    score: Number = Field(description="Sum of total_score over the allocations.")
    upper_bound: Number = Field(description="Proved bound: no allocation within the budgets has a larger score.")
    gap: Number = Field(ge=0, description="(upper_bound - score) / |upper_bound|.")
    status: Literal["optimal", "feasible"] = Field(description="optimal: the gap is proved to be within the tolerance.")
    solver: str = Field(description="Solver stages that ran.")
    utility_model: str = Field(description="Name of the utility model.")
    utility_unit: str = Field(description="Unit of the utilities.")
    lora: LoraEntry = Field(description="Scale and initialisation of LoRA.")
    predicted: PredictedEntry = Field(description="Predicted gain, and what the prediction is based on.")
    provenance: ProvenanceEntry = Field(description="Fingerprints, versions, configuration, seed.")
    checkpointed: list[Text] = Field(
        default=[],
        description="Module paths of the blocks with gradient checkpointing.",
    )

    @model_validator(mode="after")
    def _finite_values(self) -> ManifestDocument:
        for name in ("model", "lora", "predicted", "provenance"):
            _refuse_not_finite(getattr(self, name).model_dump(exclude_unset=True), name)
        return self

    @model_validator(mode="after")
    def _complete(self) -> ManifestDocument:
        _refuse_repeats("allocations: layer", [row.layer for row in self.allocations])
        _refuse_repeats("checkpointed", self.checkpointed)
        _refuse_repeats("resources: resource", [use.resource for use in self.resources])
        missing = [name for name in _NEEDED if name not in {use.resource for use in self.resources}]
        if missing:
            raise PydanticCustomError("missing_row", "resources: no row for {names}", {"names": ", ".join(missing)})
        methods = {row.method for row in self.allocations} - {"none"}
        if methods and self.provenance.seed is None:
            raise PydanticCustomError("seed", "provenance.seed: is missing; the new weights are drawn with it")
        if methods.intersection(LORA_KINDS) and self.lora.alpha_over_r is None:
            raise PydanticCustomError("scale", "lora.alpha_over_r: is missing; LoRA layers are scaled with it")
        return self

    @model_validator(mode="after")
    def _sums_agree(self) -> ManifestDocument:
        parameters = sum(row.cost for row in self.allocations)
        added = next(use.added for use in self.resources if use.resource == "trainable_params")
        if parameters > MOST_PARAMETERS:
            message = "allocations: the costs sum to more parameters than any model has"
            raise PydanticCustomError("parameters", message)
        if abs(parameters - added) > ROUNDING * parameters:
            message = "resources: trainable_params adds {added}, but the costs of the allocations sum to {sum}"
            raise PydanticCustomError("parameters", message, {"added": f"{added:.15g}", "sum": parameters})
        scores = [row.total_score for row in self.allocations]
        largest = max(abs(score) for score in (self.score, *scores))
        # As shares of the largest, since the sum of two huge numbers is not finite.
        if largest > 0 and abs(math.fsum(score / largest for score in scores) - self.score / largest) > SCORE_TOLERANCE:
            message = "score: {score} is not the sum of total_score over the allocations"
            raise PydanticCustomError("score", message, {"score": repr(self.score)})
        return self


def _refuse_repeats(kind: str, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise PydanticCustomError("repeated", "{kind} '{name}' appears twice", {"kind": kind, "name": name})
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
    if data is None:
        raise ManifestError(f"{source}: is empty; `layerlens run` writes a manifest").of(ManifestFault.SYNTAX)
    if not isinstance(data, dict):
        raise ManifestError(f"{source}: a manifest is a mapping of fields, got {type(data).__name__}").of(
            ManifestFault.SYNTAX
        )
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        came = "none" if version is None else repr(version)
        raise ManifestError(
            f"{source}: schema_version: this LayerLens reads version {SCHEMA_VERSION!r}, got {came}"
        ).of(ManifestFault.VERSION)
    try:
        return ManifestDocument.model_validate(data)
    except ValidationError as error:
        raise ManifestError("\n".join(f"{source}: {problem}" for problem in _problems(error))).of(
            ManifestFault.FIELD
        ) from error


def _problems(error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors(include_url=False):
        place = ""
        for part in problem["loc"]:
            place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
        lines.append((f"{place}: " if place else "") + _explain(problem))
    return lines


def _explain(problem: ErrorDetails) -> str:
    if problem["type"] == "missing":
        return "is missing"
    if problem["type"] == "extra_forbidden":
        known = list(
            _PARTS.get(str(problem["loc"][0]) if len(problem["loc"]) > 1 else "", ManifestDocument).model_fields
        )
        nearest = nearest_key(str(problem["loc"][-1]), known)
        return f"unknown key, did you mean {nearest!r}?" if nearest else f"unknown key; known here: {', '.join(known)}"
    must = "must be a mapping" if problem["type"] in ("model_type", "dict_type") else must_be(problem)
    came = repr(problem["input"])
    return must + ("" if len(came) > 80 else f", got {came}") + nearest_choice(problem)


_PARTS: dict[str, type[BaseModel]] = {"allocations": AllocationEntry, "resources": ResourceEntry}


def manifest_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of manifest.json, as published in docs/manifest.schema.json."""
    schema = ManifestDocument.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID, **schema}
