"""Statistics as one safetensors file: what ``layerlens optimize`` reads, and what the sensitivity cache keeps.

The header has the model's description and every scalar as JSON (exact: floats by their shortest round-trip form); the
tensors are the spectra and the Gram matrix of the neural tangent kernel.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from layerlens.exceptions import ActivationCacheError
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
from layerlens.profiling.proxy_file import study_from_json, study_to_json
from layerlens.profiling.statistics_check import check_statistics
from layerlens.storage import local_file

FORMAT = "layerlens-statistics-3"
METADATA_KEY = "layerlens"
"""The only key: safetensors writes several in the order of a hash map that differs from run to run."""

SCALARS = ("energy", "trace", "signal", "input_mean_square", "sketch_error")
SPECTRA = ("spectrum", "plain_spectrum", "sketched_spectrum")
FACTORS = ("input_factor", "output_factor")
SKETCHES = ("input_sketch", "output_sketch")


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
    content = {
        "format": FORMAT,
        "spec": dataclasses.asdict(spec),
        "layers": layers,
        "other_weights": others,
        "shared": shared,
        "modules": {name: dataclasses.asdict(costs) for name, costs in statistics.modules.items()},
        "proxies": study_to_json(statistics.proxies),
        "kernel": None if kernel is None else {name: getattr(kernel, name) for name in _KERNEL_FIELDS},
        **{name: getattr(statistics, name) for name in _MODEL_FIELDS},
    }
    return save(tensors, metadata={METADATA_KEY: json.dumps(content, sort_keys=True)})


GRAM = "kernel|gram"
_KERNEL_FIELDS = ("trace", "effective_rank", "target_alignment", "relative_error")
_MODEL_FIELDS = (
    "n_samples", "n_tokens", "mean_loss", "activation_bytes", "forward_flops", "provenance", "left_out", "coverage",
)  # fmt: skip


def _scalars(measured: MethodStatistics) -> dict[str, Any]:
    sketches = {name: getattr(measured, name) for name in SKETCHES}
    return {name: getattr(measured, name) for name in SCALARS} | {
        name: {"trace": sketch.trace, "error": sketch.error} for name, sketch in sketches.items() if sketch is not None
    }


def _arrays(prefix: str, measured: MethodStatistics) -> dict[str, np.ndarray]:
    """The spectra and factors that were asked for."""
    arrays = {name: np.ascontiguousarray(getattr(measured, name), dtype=np.float64) for name in SPECTRA}
    arrays |= {name: getattr(measured, name) for name in FACTORS}
    arrays = {name: array for name, array in arrays.items() if array.size}
    for name in SKETCHES:
        sketch = getattr(measured, name)
        if sketch is not None:
            arrays |= {f"{name}|values": sketch.values, f"{name}|vectors": sketch.vectors}
    return {f"{prefix}|{name}": array for name, array in arrays.items()}


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
    return MethodStatistics(**found)


def load_statistics(path: Path, *, whole: bool = True) -> tuple[ModelSpec, ModelStatistics]:
    """Read what ``statistics_to_bytes`` wrote, from a file or a URL.

    Args:
        path: the file.
        whole: whether it has to be of a whole model; checked for what no measurement gives.

    Raises:
        StorageError: there is nothing at the URL, or it does not match its checksum.
        ActivationCacheError: no such file, not a statistics file, truncated, or of another version.
    """
    path = local_file(path)
    if not path.is_file():
        raise ActivationCacheError(
            f"no statistics file at {path}; `layerlens run` writes one as statistics.safetensors"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, OSError) as error:
        raise ActivationCacheError(
            f"{path} is not a readable safetensors file ({error}); profile the model again"
        ) from error
    try:
        content = json.loads(metadata.get(METADATA_KEY, "{}"))
        if content.get("format") != FORMAT:
            raise ActivationCacheError(
                f"{path} is not a {FORMAT} file (format {content.get('format')!r}); profile the model again"
            )
        spec, statistics = _from_content(content, tensors)
    except ActivationCacheError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise ActivationCacheError(f"{path} has a damaged header ({error!r}); profile the model again") from error
    try:
        if whole:
            check_statistics(spec, statistics)
    except ActivationCacheError as error:
        raise ActivationCacheError(f"{path}: {error}; profile the model again") from error
    return spec, statistics


def _from_content(content: dict[str, Any], tensors: dict[str, np.ndarray]) -> tuple[ModelSpec, ModelStatistics]:
    tensors = tensors | {name: tensors[first] for name, first in content["shared"].items()}
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
        **model_fields,
    )
