"""Numbers as people read them, with the unit of each resource."""

from __future__ import annotations

RESOURCE_NAMES = {
    "trainable_params": "trainable parameters",
    "flops": "added FLOPs",
    "vram_gb": "memory",
    "latency_ms": "latency",
    "loss_drop": "loss drop of the choice in a proxy's steps",
    "uniform_loss_drop": "the same with all layers alike",
}
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def amount(resource: str, value: float) -> str:
    """``value`` of ``resource`` with its unit: ``59,904``, ``57.3 M``, ``0.312 GB``, ``62.1 ms``."""
    if resource == "trainable_params":
        return f"{round(value):,}"
    if resource == "flops":
        return scaled(value)
    if resource == "vram_gb":
        return f"{significant(value)} GB" if abs(value) >= 0.1 or value == 0 else f"{significant(value * 1e3)} MB"
    if resource.endswith("_ms"):
        return f"{significant(value)} ms"
    return significant(value)


def scaled(value: float) -> str:
    """``value`` with three digits and a prefix: 57.3 M."""
    for size, letter in _PREFIXES:
        if abs(value) >= 0.9995 * size:
            return f"{significant(value / size)} {letter}"
    return significant(value)


def significant(value: float) -> str:
    """Three significant digits; no exponent where a person would not write one."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 1e-4:
        return f"{value:.3g}"
    return f"{value:.2e}"


def share(fraction: float) -> str:
    """A share as a percentage, never rounded up to a full 100 % nor down to 0."""
    percent = 100.0 * fraction
    if 99.5 <= percent < 100.0:
        return ">99 %"
    if 0.0 < percent < 0.5:
        return "<1 %"
    return f"{percent:.0f} %"


def gap(value: float) -> str:
    """An optimality gap with two digits; exact zero is 0 %, and what only rounding leaves is below 0.0001 %."""
    if 0 < value < 1e-6:
        return "<0.0001 %"
    return f"{100.0 * value:.2g} %"
