"""Whether statistics that come from a file can be true at all: asked at the door, by layer and field."""

from __future__ import annotations

from layerlens.exceptions import ActivationCacheError
from layerlens.models import MethodStatistics, ModelSpec, ModelStatistics

NEVER_NEGATIVE = ("energy", "trace", "input_mean_square")
SCALARS = (*NEVER_NEGATIVE, "signal")


def check_statistics(spec: ModelSpec, statistics: ModelStatistics) -> None:
    """Refuse statistics that no measurement gives. NaN and infinity are left to ``measure.refuse_non_finite``.

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
        raise ActivationCacheError(f"the statistics are not those of the model's layers in their order: {what}")
    for layer, found in zip(spec.layers, statistics.layers, strict=True):
        if set(found.by_method) != set(layer.methods):
            raise ActivationCacheError(
                f"{layer.name}: has statistics for {', '.join(sorted(found.by_method)) or 'no method'}, but takes "
                f"{', '.join(sorted(layer.methods))}"
            )
        for method, values in found.by_method.items():
            _check_scalars(f"{layer.name}: {method}", values)
    if not isinstance(statistics.n_samples, int) or statistics.n_samples < 2:
        raise ActivationCacheError(f"n_samples must be 2 or more, got {statistics.n_samples!r}")


def _check_scalars(place: str, values: MethodStatistics) -> None:
    for name in SCALARS:
        value = getattr(values, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ActivationCacheError(f"{place}: {name} must be a number, got {value!r}")
        if name in NEVER_NEGATIVE and value < 0:
            raise ActivationCacheError(f"{place}: {name} cannot be negative, got {value!r}")
