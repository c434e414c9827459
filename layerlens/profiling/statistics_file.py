"""Statistics as one safetensors file: what ``layerlens optimize`` reads, and what the sensitivity cache keeps.

The header has the model's description and every scalar as JSON (exact: floats by their shortest round-trip form); the
tensors are spectra, factors, other arrays of statistics, and the Gram matrix of the neural tangent kernel. How a field
is kept follows from its kind (``models.statistics``).
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from layerlens.exceptions import ActivationCacheError
from layerlens.faults import StatisticsFault
from layerlens.models import (
    FactorSketch,
    KernelStatistics,
    LayerSpec,
    LayerStatistics,
    MethodStatistics,
    ModelSpec,
    ModelStatistics,
    ModuleCosts,
)
from layerlens.models.statistics import NOT_NEGATIVE, NUMBER, Extra
from layerlens.models.step import StepRecord
from layerlens.profiling.declared_header import check_header
from layerlens.profiling.declared_tensors import (
    FACTORS,
    GRAM,
    HEAD,
    MODEL,
    SKETCHES,
    SPECTRA,
    STEP,
    dtypes_of,
    must_be_finite,
    read_tensors,
)
from layerlens.profiling.proxies import study_from_json, study_to_json
from layerlens.storage import local_file
from layerlens.utils.atomic import settle

FORMAT = "layerlens-statistics-4"
METADATA_KEY = "layerlens"
"""The only key: safetensors writes several in the order of a hash map that differs from run to run."""
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

NUMBERS = MethodStatistics.names_of(NUMBER, NOT_NEGATIVE)


def statistics_to_bytes(spec: ModelSpec, statistics: ModelStatistics) -> bytes:
    """The file's content; equal inputs give equal bytes."""
    arrays: dict[str, np.ndarray] = {}
    layers = []
    for layer in statistics.layers:
        methods = {}
        for method, measured in layer.by_method.items():
            methods[method] = _scalars(measured)
            arrays |= _arrays(f"{layer.layer}|{method}", measured)
        layers.append({"layer": layer.layer, "methods": methods})
    others = {name: _scalars(measured) for name, measured in statistics.other_weights.items()}
    for name, measured in statistics.other_weights.items():
        arrays |= _arrays(f"{name}|weight", measured)
    tensors, shared = _without_repeats(arrays)
    kernel = statistics.kernel
    if kernel is not None:
        tensors[GRAM] = np.ascontiguousarray(kernel.gram, dtype=np.float64)
    of_model = {name: value for name, value in (statistics.extra or {}).items() if isinstance(value, np.ndarray)}
    tensors |= {f"{MODEL}|{name}": np.ascontiguousarray(value) for name, value in of_model.items()}
    tensors |= {f"{HEAD}|{name}": np.asarray(value, order="C") for name, value in statistics.head.items()}
    step = statistics.step
    if step is not None:
        tensors |= {f"{STEP}|{name}": np.ascontiguousarray(x, dtype=np.float64) for name, x in step.arrays().items()}
    content = {
        "format": FORMAT,
        "spec": dataclasses.asdict(spec),
        "layers": layers,
        "other_weights": others,
        "shared": shared,
        "modules": {name: _costs(costs) for name, costs in statistics.modules.items()},
        "proxies": study_to_json(statistics.proxies),
        "step": None if step is None else step.numbers(),
        "kernel": None if kernel is None else {name: getattr(kernel, name) for name in _KERNEL_FIELDS},
        **{name: getattr(statistics, name) for name in _MODEL_FIELDS},
        **_extra_numbers(statistics.extra),
        **({"head": dtypes_of(statistics.head)} if statistics.head else {}),
    }
    return save(tensors, metadata={METADATA_KEY: json.dumps(content, sort_keys=True)})


_KERNEL_FIELDS = ("trace", "effective_rank", "target_alignment", "relative_error")
_MODEL_FIELDS = (
    "n_samples", "n_tokens", "mean_loss", "activation_bytes", "forward_flops", "provenance", "left_out", "unmeasured",
    "coverage",
)  # fmt: skip


def _scalars(measured: MethodStatistics) -> dict[str, Any]:
    sketches = {name: getattr(measured, name) for name in SKETCHES}
    return (
        _extra_numbers(measured.extra)
        | {name: getattr(measured, name) for name in NUMBERS}
        | {
            name: {"trace": sketch.trace, "error": sketch.error}
            for name, sketch in sketches.items()
            if sketch is not None
        }
    )


def _arrays(prefix: str, measured: MethodStatistics) -> dict[str, np.ndarray]:
    """The spectra and factors that were asked for."""
    arrays = {name: np.ascontiguousarray(getattr(measured, name), dtype=np.float64) for name in SPECTRA}
    arrays |= {name: getattr(measured, name) for name in FACTORS}
    arrays = {name: array for name, array in arrays.items() if array.size}
    for name in SKETCHES:
        sketch = getattr(measured, name)
        if sketch is not None:
            arrays |= {f"{name}|values": sketch.values, f"{name}|vectors": sketch.vectors}
    arrays |= {name: value for name, value in (measured.extra or {}).items() if isinstance(value, np.ndarray)}
    return {f"{prefix}|{name}": array for name, array in arrays.items()}


def _extra_numbers(extra: Extra | None) -> dict[str, Any]:
    """For the header: the numbers, and None for every array, which is kept as a tensor; nothing where there is none."""
    values = {name: None if isinstance(x, np.ndarray) else x for name, x in (extra or {}).items()}
    return {"extra": values} if values else {}


def _extra_from(prefix: str, content: dict[str, Any], tensors: dict[str, np.ndarray]) -> Extra | None:
    values = content.get("extra")
    if values is None:
        return None
    return {name: tensors[f"{prefix}|{name}"] if value is None else value for name, value in values.items()}


def _costs(costs: ModuleCosts) -> dict[str, Any]:
    return {name: x for name, x in dataclasses.asdict(costs).items() if name != "extra" or x is not None}


def _without_repeats(arrays: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays, and under which name those stand that are the very array of another (query, key and value's A)."""
    first: dict[int, str] = {}
    shared = {name: first[id(array)] for name, array in arrays.items() if first.setdefault(id(array), name) != name}
    return {name: np.ascontiguousarray(array) for name, array in arrays.items() if name not in shared}, shared


def _measured(prefix: str, scalars: dict[str, Any], tensors: dict[str, np.ndarray]) -> MethodStatistics:
    found: dict[str, Any] = dict(scalars)
    for name in (*SPECTRA, *FACTORS):
        if f"{prefix}|{name}" in tensors:
            found[name] = tensors[f"{prefix}|{name}"]
    for name in SKETCHES:
        if name in found:
            values, vectors = (tensors[f"{prefix}|{name}|{part}"] for part in ("values", "vectors"))
            found[name] = FactorSketch(values, vectors, **found[name])
    return MethodStatistics(**found | {"extra": _extra_from(prefix, scalars, tensors)})


def load_statistics(path: Path, *, whole: bool = True) -> tuple[ModelSpec, ModelStatistics]:
    """Read what ``statistics_to_bytes`` wrote, from a file or a URL.

    Args:
        path: the file.
        whole: whether it must be of a whole model; checked for what no measurement gives.

    Raises:
        StorageError: there is nothing at the URL, or it does not match its checksum.
        ActivationCacheError: no such file, not a statistics file, truncated, or of another version.
    """
    path = local_file(path)
    settle(path.parent)
    if not path.is_file():
        raise ActivationCacheError(
            f"no statistics file at {path}; `layerlens run` writes one as statistics.safetensors"
        ).of(StatisticsFault.MISSING)
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(METADATA_KEY, "{}")
            content = _header(text)
            if whole:
                check_header(text)
            spec, statistics = _from_content(content, read_tensors(file, content, finite=whole))
            if whole:
                check_statistics(spec, statistics)
    except ActivationCacheError as error:
        told = ActivationCacheError(f"{path}: {error}; profile the model again")
        raise told.of(error.fault or StatisticsFault.CONTENT) from error
    except (SafetensorError, OSError) as error:
        raise ActivationCacheError(f"{path} is not a readable safetensors file ({error}); profile the model again").of(
            StatisticsFault.UNREADABLE
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise ActivationCacheError(f"{path} has a damaged header ({error!r}); profile the model again").of(
            StatisticsFault.HEADER
        ) from error
    return spec, statistics


def _header(text: str) -> dict[str, Any]:
    """What the header says.

    Raises:
        ActivationCacheError: it is of another format, or has text that no file or answer could carry on.
        ValueError, RecursionError: it is not JSON.
    """
    content = json.loads(text)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise ActivationCacheError(f"is not a {FORMAT} file (format {found!r})").of(StatisticsFault.FORMAT)
    if _ESCAPED_SURROGATE.search(text):  # pairs are one character, and pass
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            around = error.object[max(0, error.start - 40) : error.end + 10]
            raise ActivationCacheError(f"the header has half a character (a lone surrogate): {around!a}").of(
                StatisticsFault.HEADER
            ) from error
    return content


def _from_content(content: dict[str, Any], tensors: dict[str, np.ndarray]) -> tuple[ModelSpec, ModelStatistics]:
    spec_fields = dict(content["spec"])
    layer_specs = [LayerSpec(**fields) for fields in spec_fields.pop("layers")]
    layers = tuple(
        LayerStatistics(
            entry["layer"],
            {
                method: _measured(f"{entry['layer']}|{method}", scalars, tensors)
                for method, scalars in entry["methods"].items()
            },
        )
        for entry in content["layers"]
    )
    others = {name: _measured(f"{name}|weight", x, tensors) for name, x in content["other_weights"].items()}
    kernel = None if content["kernel"] is None else KernelStatistics(gram=tensors[GRAM], **content["kernel"])
    model_fields = {name: content[name] for name in _MODEL_FIELDS}
    return ModelSpec(layers=layer_specs, **spec_fields), ModelStatistics(
        layers=layers,
        other_weights=others,
        kernel=kernel,
        modules={name: ModuleCosts(**costs) for name, costs in content["modules"].items()},
        proxies=study_from_json(content["proxies"]),
        extra=_extra_from(MODEL, content, tensors),
        head={name: tensors[f"{HEAD}|{name}"] for name in content.get("head", ())},
        step=_step(content, tensors),
        **model_fields,
    )


def _step(content: dict[str, Any], tensors: dict[str, np.ndarray]) -> StepRecord | None:
    """The recorded step; None in files of versions that recorded none, and where none could be recorded."""
    numbers = content.get("step")
    if numbers is None:
        return None
    return StepRecord.of(numbers, {name: tensors[f"{STEP}|{name}"] for name in StepRecord.array_names()})


def check_statistics(spec: ModelSpec, statistics: ModelStatistics) -> None:
    """Refuse statistics that no measurement gives; ``declared_tensors`` does so for arrays.

    Raises:
        ActivationCacheError: names the layer and the field, what it has and what would be possible.
    """
    for layer in spec.layers:
        for name in ("hidden_size", "n_in", "n_out", "d_kv", "num_heads"):
            value = getattr(layer, name)
            if not isinstance(value, int) or value < 1:
                raise ActivationCacheError(f"{layer.name}: {name} must be a whole number above 0, got {value!r}")
    named, measured = [layer.name for layer in spec.layers], [layer.layer for layer in statistics.layers]
    if measured != named:
        wrong = next((pair for pair in zip(named, measured, strict=False) if pair[0] != pair[1]), None)
        what = (
            f"{wrong[1]!r} stands where {wrong[0]!r} should" if wrong else f"{len(measured)} of {len(named)} are there"
        )
        raise ActivationCacheError(f"the statistics do not match the model's layers in their order: {what}")
    for layer, found in zip(spec.layers, statistics.layers, strict=True):
        if set(found.by_method) != set(layer.methods):
            raise ActivationCacheError(
                f"{layer.name}: has statistics for {', '.join(sorted(found.by_method)) or 'no method'}, but takes "
                f"{', '.join(sorted(layer.methods))}"
            )
        for method, values in found.by_method.items():
            _check_scalars(f"{layer.name}: {method}", values)
    for name in ("mean_loss", "activation_bytes", "forward_flops"):
        _check_number(name, getattr(statistics, name))
    if not isinstance(statistics.n_samples, int) or statistics.n_samples < 2:
        raise ActivationCacheError(f"n_samples must be 2 or more, got {statistics.n_samples!r}")


def _check_scalars(place: str, values: MethodStatistics) -> None:
    never_negative = MethodStatistics.names_of(NOT_NEGATIVE)
    for name in NUMBERS:
        value = getattr(values, name)
        if value is None:
            continue
        _check_number(f"{place}: {name}", value)
        if name in never_negative and value < 0:
            raise ActivationCacheError(f"{place}: {name} cannot be negative, got {value!r}")
    for name in SKETCHES:
        sketch = getattr(values, name)
        if sketch is not None:
            _check_number(f"{place}: {name}: trace", sketch.trace)
            _check_number(f"{place}: {name}: error", sketch.error)
    for name, value in (values.extra or {}).items():
        if not isinstance(value, np.ndarray) and must_be_finite(name):
            _check_number(f"{place}: {name}", value)


def _check_number(place: str, value: Any) -> None:
    most = 2**63 if isinstance(value, int) else sys.float_info.max  # NumPy knows no larger whole numbers
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= most:
        raise ActivationCacheError(f"{place} must be a finite number, got {value!r}")
