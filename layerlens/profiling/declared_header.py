"""What the header of a statistics file must be, field by field, with the types of the nouns that are made of it."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue, TypeAdapter, ValidationError

from layerlens.exceptions import ActivationCacheError
from layerlens.faults import StatisticsFault
from layerlens.models import LayerSpec, MethodStatistics, ModelSpec, ProxyStudy
from layerlens.models.statistics import NOT_NEGATIVE, NUMBER, SKETCH

MOST = 2**63 - 1
"""No count in a file is larger; sums of some of them still are doubles."""


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


Scalars = dict[str, JsonValue]
"""Statistics of one matrix by name: numbers, the two of a sketch, and those of ``extra``."""


class _Layer(_Part):
    layer: str
    methods: dict[str, Scalars]


class _Module(_Part):
    activation_bytes: float | None = None
    forward_flops: float | None = None
    forward_ms: float | None = None
    extra: dict[str, float | None] | None = None


class _Kernel(_Part):
    trace: float
    effective_rank: float
    target_alignment: float | None
    relative_error: float


class _Identity(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    data: dict[str, JsonValue] = {}


class _Provenance(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    identity: _Identity = _Identity()
    model: dict[str, JsonValue] = {}


class _Step(_Part):
    layers: list[str]
    batch_sizes: list[int]
    blocks: list[str]
    sequence_length: int
    head_tensors: int
    head_elements: int
    uncounted: dict[str, str] = {}
    rates: dict[str, JsonValue] | None


class _Header(_Part):
    format: str
    spec: ModelSpec
    layers: list[_Layer]
    other_weights: dict[str, Scalars]
    shared: dict[str, str]
    modules: dict[str, _Module]
    proxies: ProxyStudy | None
    kernel: _Kernel | None
    n_samples: int
    n_tokens: int
    mean_loss: float
    activation_bytes: float
    forward_flops: float
    provenance: _Provenance
    left_out: dict[str, str]
    unmeasured: dict[str, str]
    coverage: float
    extra: dict[str, float | None] | None = None
    head: dict[str, str] = {}
    step: _Step | None = None


def check_header(text: str) -> None:
    """Compare a header, as JSON, with its declaration.

    Raises:
        ActivationCacheError: names the first field that is not as it must be, and what came.
    """
    try:
        header = _adapter().validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the header"
        came = repr(first["input"])
        told = f", got {came}" if len(came) <= 80 and first["type"] != "missing" else ""
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ActivationCacheError(f"{place}: {_plain(first['msg'])}{told}{more}").of(StatisticsFault.HEADER) from error
    for entry in header.layers:
        for method, scalars in entry.methods.items():
            _check_scalars(f"{entry.layer}: {method}", scalars)
    for name, scalars in header.other_weights.items():
        _check_scalars(name, scalars)
    _check_counts("spec", header.spec, ("total_params", "weight_bytes"))
    for layer in header.spec.layers:
        _check_counts(layer.name, layer, _COUNTS)


def _check_scalars(place: str, scalars: Scalars) -> None:
    """Each name with the kind of value that it has; numbers are left to ``statistics_file.check_statistics``."""
    for name, value in scalars.items():
        if name not in (*_NUMBERS, *_SKETCHES, "extra"):
            raise ActivationCacheError(f"{place}: {name} is not a number of any statistic")
        if name in _NUMBERS:
            continue
        fits = isinstance(value, dict) and all(
            isinstance(part, int | float | None) and not isinstance(part, bool) for part in value.values()
        )
        if not fits or (name in _SKETCHES and value.keys() != {"trace", "error"}):  # type: ignore[union-attr]
            raise ActivationCacheError(f"{place}: {name} must be numbers by name, got {_short(value)}")


_NUMBERS = MethodStatistics.names_of(NUMBER, NOT_NEGATIVE)
_SKETCHES = MethodStatistics.names_of(SKETCH)
_COUNTS = (
    "hidden_size", "n_in", "n_out", "d_kv", "num_heads", "groups", "positions", "input_elements", "experts",
    "experts_per_token",
)  # fmt: skip
_MAY_BE_ZERO = ("positions", "input_elements", "total_params", "weight_bytes")


def _check_counts(place: str, part: LayerSpec | ModelSpec, names: tuple[str, ...]) -> None:
    for name in names:
        value, least = getattr(part, name), 0 if name in _MAY_BE_ZERO else 1
        if not least <= value <= MOST:
            raise ActivationCacheError(f"{place}: {name} must be a whole number from {least} on, got {_short(value)}")


def _plain(message: str) -> str:
    return message[:1].lower() + message[1:]


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) <= MOST else f"a number of {value.bit_length()} bits"
    return text if len(text) <= 80 else f"{text[:77]}..."


@cache
def _adapter() -> TypeAdapter[_Header]:
    return TypeAdapter(_Header)
