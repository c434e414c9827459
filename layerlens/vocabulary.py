"""The names, keys and units of the budgets, as people and files see them: one row for each resource."""

from __future__ import annotations

import math
from dataclasses import dataclass

from layerlens.quantities import COUNT, MEMORY, TIME, Quantity


@dataclass(frozen=True)
class Resource:
    """What one budget limits.

    Args:
        name: as manifests have it, with its unit.
        label: in a sentence or a table of the command line.
        heading: in the report.
        unit: of one of it.
        budget: its key in the section ``optimization``.
        objective: its key in ``optimization.objective_weights``.
        quantity: how its amounts are written.
        always: whether it is predicted for every model, so that every manifest has its row.
    """

    name: str
    label: str
    heading: str
    unit: str
    budget: str
    objective: str
    quantity: Quantity
    always: bool = True


RESOURCES = {
    resource.name: resource
    for resource in (
        Resource(
            "trainable_params",
            "trainable parameters",
            "Trainable parameters",
            "parameter",
            "max_trainable_params",
            "cost",
            COUNT,
        ),
        Resource("flops", "added FLOPs", "Added FLOPs", "FLOP", "max_flops", "flops", COUNT),
        Resource("vram_gb", "memory", "Training memory", "GB", "max_vram_gb", "vram", MEMORY),
        Resource("latency_ms", "latency", "Forward latency", "ms", "latency_target_ms", "latency", TIME),
        Resource("step_ms", "step time", "Training step", "ms", "max_step_ms", "step", TIME, always=False),
    )
}
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


MOST_DIGITS = 1e15
"""From here on a number is shown with an exponent: nobody counts more digits, and not all of them are known."""


def as_float(value: float) -> float:
    """``value`` as a double; a whole number beyond all doubles is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def without_digits(value: float) -> str:
    """How a number that has no digits is shown; "" for any other.

    >>> without_digits(float("inf")), without_digits(-float("inf")), without_digits(float("nan")), without_digits(1e308)
    ('∞', '−∞', 'not a number', '')
    """
    if math.isnan(value):
        return "not a number"
    return "" if math.isfinite(value) else "∞" if value > 0 else "−∞"


def prefixed(value: float) -> tuple[float, str]:
    """``value`` in the largest SI prefix that leaves at least 1, and the prefix.

    999.96 would be shown as 1000, so the next prefix begins a little early.

    >>> prefixed(57.3e6), prefixed(12.0)
    ((57.3, 'M'), (12.0, ''))
    """
    value = as_float(value)
    for size, letter in PREFIXES:
        if abs(value) >= 0.9995 * size:
            return value / size, letter
    return value, ""
