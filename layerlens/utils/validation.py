"""Checks of model specifications, activation caches and configurations that callers build.

Every message names the layer and the field, shows the value, and says what works instead.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from layerlens.config import OptimizationConfig, ProfilingConfig
from layerlens.config.base import describe
from layerlens.exceptions import ActivationCacheError, ConfigurationError, ModelSpecError
from layerlens.models import LayerSpec, ModelSpec
from layerlens.models.model_spec import ATTENTION, CONV, EMBEDDING, LINEAR, NORM, TRANSFORMER
from layerlens.registry import METHODS

ActivationCache = Mapping[str, Mapping[str, float]]

# Metric of the activation cache -> whether it may be below 0. A short proxy training can make the loss worse.
CACHE_METRICS = {"grad_norm": False, "fisher_trace": False, "proxy_gain": True}
LAYER_TYPES = (TRANSFORMER, LINEAR, ATTENTION, CONV, NORM, EMBEDDING)
_LISTED = 5


def validate_model_spec(spec: ModelSpec) -> None:
    """Check that the names of the layers differ, and that costs can be computed from their sizes.

    Raises:
        ModelSpecError: the first problem, with the layer and the field.
    """
    if not isinstance(spec, ModelSpec):
        raise ModelSpecError(f"expected a ModelSpec, got {type(spec).__name__}")
    if not isinstance(spec.model_name, str) or not spec.model_name.strip():
        raise ModelSpecError(f"model_name must be text that names the model, got {spec.model_name!r}")
    _positive_integer(spec.total_params, "total_params")
    _positive_integer(spec.weight_bytes, "weight_bytes")
    if not spec.layers:
        raise ModelSpecError(f"model {spec.model_name!r} has no layers; give at least one LayerSpec")
    seen: dict[str, int] = {}
    for index, layer in enumerate(spec.layers):
        if not isinstance(layer, LayerSpec):
            raise ModelSpecError(f"layers[{index}] must be a LayerSpec, got {type(layer).__name__}")
        if not isinstance(layer.name, str) or not layer.name.strip():
            raise ModelSpecError(f"layers[{index}].name must be text, got {layer.name!r}")
        if layer.name in seen:
            raise ModelSpecError(
                f"layer {layer.name!r} appears twice (layers[{seen[layer.name]}] and layers[{index}]); names must be "
                "unique"
            )
        seen[layer.name] = index
        _validate_layer(layer)


def validate_activation_cache(cache: ActivationCache, spec: ModelSpec) -> None:
    """Check that ``cache`` has finite metrics for every layer of ``spec``, and for no other layer.

    The metrics are ``grad_norm`` and ``fisher_trace`` (both >= 0) and ``proxy_gain``. Each must be given for all layers
    or for none.

    Raises:
        ActivationCacheError: the first problem, with the layer and the metric.
    """
    if not isinstance(cache, Mapping):
        raise ActivationCacheError(f"expected a mapping of layer -> metrics, got {type(cache).__name__}")
    names = [layer.name for layer in spec.layers]
    unknown = [name for name in cache if name not in set(names)]
    if unknown:
        nearest = difflib.get_close_matches(str(unknown[0]), names, n=3, cutoff=0.5)
        hint = f"; nearest known: {', '.join(nearest)}" if nearest else f"; the model has {_some(names)}"
        raise ActivationCacheError(f"unknown layer {_some(unknown, quoted=True)} in the activation cache{hint}")
    missing = [name for name in names if name not in cache]
    if missing:
        raise ActivationCacheError(
            f"the activation cache lacks {len(missing)} of {len(names)} layers: {_some(missing)}; "
            "measure every layer of the model"
        )
    for name in names:
        _validate_metrics(name, cache[name])
    for metric in CACHE_METRICS:
        without = [name for name in names if metric not in cache[name]]
        if 0 < len(without) < len(names):
            raise ActivationCacheError(
                f"{metric!r} is missing in {len(without)} of {len(names)} layers: {_some(without)}; "
                "give it for every layer, or for none"
            )


def validate_config(profiling: ProfilingConfig, optimization: OptimizationConfig) -> None:
    """Check both sections, even if they were built without checks (``model_construct``, ``model_copy``).

    Raises:
        ConfigurationError: every problem, with its field and value.
    """
    for section, kind in ((profiling, ProfilingConfig), (optimization, OptimizationConfig)):
        if not isinstance(section, kind):
            raise ConfigurationError(f"expected {kind.__name__}, got {type(section).__name__}")
        try:
            kind.model_validate(section.model_dump(warnings=False))
        except ValidationError as error:
            raise ConfigurationError(describe(error, kind.__name__)) from error


def _validate_layer(layer: LayerSpec) -> None:
    place = f"layer {layer.name!r}: "
    for name in ("hidden_size", "n_in", "n_out", "d_kv", "num_heads", "groups"):
        _positive_integer(getattr(layer, name), place + name)
    if layer.layer_type not in LAYER_TYPES:
        raise ModelSpecError(f"{place}layer_type must be one of {', '.join(LAYER_TYPES)}, got {layer.layer_type!r}")
    if not layer.methods:
        raise ModelSpecError(f"{place}methods is empty; leave the layer out, or name methods that it can take")
    for method in layer.methods:
        if method not in METHODS:
            raise ModelSpecError(f"{place}unknown method {method!r}; known: {', '.join(METHODS)}")
    if layer.block is not None and not (_is_integer(layer.block) and layer.block >= 0):
        raise ModelSpecError(f"{place}block must be None or an index from 0, got {layer.block!r}")


def _validate_metrics(layer: str, metrics: Any) -> None:
    place = f"layer {layer!r}"
    if not isinstance(metrics, Mapping):
        raise ActivationCacheError(f"{place}: expected a mapping of metrics, got {type(metrics).__name__}")
    if not metrics:
        raise ActivationCacheError(f"{place}: has no metrics; give at least one of {', '.join(CACHE_METRICS)}")
    for metric, value in metrics.items():
        if metric not in CACHE_METRICS:
            nearest = difflib.get_close_matches(str(metric), CACHE_METRICS, n=1)
            hint = f", did you mean {nearest[0]!r}?" if nearest else f"; known: {', '.join(CACHE_METRICS)}"
            raise ActivationCacheError(f"{place}: unknown metric {metric!r}{hint}")
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ActivationCacheError(f"{place}: {metric} must be a number, got {value!r}")
        if not math.isfinite(value):
            raise ActivationCacheError(
                f"{place}: {metric} is {float(value)}, not a finite number; look for an overflow where it was measured"
            )
        if value < 0 and not CACHE_METRICS[metric]:
            raise ActivationCacheError(f"{place}: {metric} cannot be negative, got {value!r}")


def _positive_integer(value: Any, place: str) -> None:
    if not _is_integer(value) or value <= 0:
        raise ModelSpecError(f"{place} must be a whole number above 0, got {value!r}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _some(names: Iterable[Any], *, quoted: bool = False) -> str:
    """The first few names, and how many more there are."""
    listed = [repr(name) if quoted else str(name) for name in names]
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more
