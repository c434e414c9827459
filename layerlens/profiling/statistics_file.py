"""Statistics as one safetensors file: what ``layerlens optimize`` reads, and what the sensitivity cache keeps.

The header has the model's description and every scalar as JSON (exact: floats by their shortest round-trip form); the
tensors are the spectra.
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
from layerlens.models import LayerSpec, LayerStatistics, MethodStatistics, ModelSpec, ModelStatistics

FORMAT = "layerlens-statistics-1"
METADATA_KEY = "layerlens"
"""The only key: safetensors writes several in the order of a hash map that differs from run to run."""

SCALARS = ("energy", "trace", "signal", "input_mean_square")


def statistics_to_bytes(spec: ModelSpec, statistics: ModelStatistics) -> bytes:
    """The file's content; equal inputs give equal bytes."""
    tensors, layers = {}, []
    for layer in statistics.layers:
        methods = {}
        for method, measured in layer.by_method.items():
            methods[method] = {name: getattr(measured, name) for name in SCALARS}
            tensors[f"{layer.layer}|{method}"] = np.ascontiguousarray(measured.spectrum, dtype=np.float64)
        layers.append({"layer": layer.layer, "methods": methods})
    content = {
        "format": FORMAT,
        "spec": dataclasses.asdict(spec),
        "layers": layers,
        **{name: getattr(statistics, name) for name in _MODEL_FIELDS},
    }
    return save(tensors, metadata={METADATA_KEY: json.dumps(content, sort_keys=True)})


_MODEL_FIELDS = ("n_samples", "n_tokens", "mean_loss", "activation_bytes", "forward_flops", "provenance")


def load_statistics(path: Path) -> tuple[ModelSpec, ModelStatistics]:
    """Read what ``statistics_to_bytes`` wrote.

    Raises:
        ActivationCacheError: no such file, not a statistics file, truncated, or of another version.
    """
    if not path.is_file():
        raise ActivationCacheError(
            f"no statistics file at {path}; `layerlens run` writes one as statistics.safetensors"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            spectra = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
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
        return _from_content(content, spectra)
    except ActivationCacheError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ActivationCacheError(f"{path} has a damaged header ({error!r}); profile the model again") from error


def _from_content(content: dict[str, Any], spectra: dict[str, np.ndarray]) -> tuple[ModelSpec, ModelStatistics]:
    spec_fields = dict(content["spec"])
    layer_specs = [LayerSpec(**fields) for fields in spec_fields.pop("layers")]
    layers = tuple(
        LayerStatistics(
            entry["layer"],
            {
                method: MethodStatistics(**scalars, spectrum=spectra[f"{entry['layer']}|{method}"])
                for method, scalars in entry["methods"].items()
            },
        )
        for entry in content["layers"]
    )
    model_fields = {name: content[name] for name in _MODEL_FIELDS}
    return ModelSpec(layers=layer_specs, **spec_fields), ModelStatistics(layers=layers, **model_fields)
