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
from layerlens.models import KernelStatistics, LayerSpec, LayerStatistics, MethodStatistics, ModelSpec, ModelStatistics
from layerlens.profiling.statistics_check import check_statistics
from layerlens.storage import local_file

FORMAT = "layerlens-statistics-2"
METADATA_KEY = "layerlens"
"""The only key: safetensors writes several in the order of a hash map that differs from run to run."""

SCALARS = ("energy", "trace", "signal", "input_mean_square")
SPECTRA = ("spectrum", "plain_spectrum")


def statistics_to_bytes(spec: ModelSpec, statistics: ModelStatistics) -> bytes:
    """The file's content; equal inputs give equal bytes."""
    tensors: dict[str, np.ndarray] = {}
    layers = []
    for layer in statistics.layers:
        methods = {}
        for method, measured in layer.by_method.items():
            methods[method] = _scalars(measured)
            tensors |= _spectra(f"{layer.layer}|{method}", measured)
        layers.append({"layer": layer.layer, "methods": methods})
    others = {name: _scalars(measured) for name, measured in statistics.other_weights.items()}
    for name, measured in statistics.other_weights.items():
        tensors |= _spectra(f"{name}|weight", measured)
    kernel = statistics.kernel
    if kernel is not None:
        tensors[GRAM] = np.ascontiguousarray(kernel.gram, dtype=np.float64)
    content = {
        "format": FORMAT,
        "spec": dataclasses.asdict(spec),
        "layers": layers,
        "other_weights": others,
        "kernel": None if kernel is None else {name: getattr(kernel, name) for name in _KERNEL_FIELDS},
        **{name: getattr(statistics, name) for name in _MODEL_FIELDS},
    }
    return save(tensors, metadata={METADATA_KEY: json.dumps(content, sort_keys=True)})


GRAM = "kernel|gram"
_KERNEL_FIELDS = ("trace", "effective_rank", "target_alignment")
_MODEL_FIELDS = (
    "n_samples", "n_tokens", "mean_loss", "activation_bytes", "forward_flops", "provenance", "left_out", "coverage",
)  # fmt: skip


def _scalars(measured: MethodStatistics) -> dict[str, float | None]:
    return {name: getattr(measured, name) for name in SCALARS}


def _spectra(prefix: str, measured: MethodStatistics) -> dict[str, np.ndarray]:
    """The spectra that were asked for."""
    arrays = {name: np.ascontiguousarray(getattr(measured, name), dtype=np.float64) for name in SPECTRA}
    return {f"{prefix}|{name}": array for name, array in arrays.items() if array.size}


def _measured(prefix: str, scalars: dict[str, Any], tensors: dict[str, np.ndarray]) -> MethodStatistics:
    spectra: dict[str, Any] = {name: tensors[f"{prefix}|{name}"] for name in SPECTRA if f"{prefix}|{name}" in tensors}
    return MethodStatistics(**scalars, **spectra)


def load_statistics(path: Path) -> tuple[ModelSpec, ModelStatistics]:
    """Read what ``statistics_to_bytes`` wrote, from a file or a URL.

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
        check_statistics(spec, statistics)
    except ActivationCacheError as error:
        raise ActivationCacheError(f"{path}: {error}; profile the model again") from error
    return spec, statistics


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
        layers=layers, other_weights=others, kernel=kernel, **model_fields
    )
