"""Numbers as the report shows them: few digits, units beside them, thin gaps between thousands."""

from __future__ import annotations

import math

from layerlens.models import NONE
from layerlens.registry import METHODS
from layerlens.vocabulary import MOST_DIGITS, RESOURCES, as_float, prefixed, without_digits

UNITS = {name: resource.unit for name, resource in RESOURCES.items()}
RESOURCE_NAMES = {name: resource.heading for name, resource in RESOURCES.items()}


def method_name(method: str) -> str:
    """What a report calls the method of a row."""
    return method if method == NONE else METHODS[method].label


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float) -> str:
    """Whole numbers in full, others with four significant digits.

    >>> number(41234), number(0.00012345), number(0), number(-2.5), number(1.2e-5)
    ('41,234', '0.0001234', '0', '−2.5', '1.2×10⁻⁵')
    >>> number(2440.3), number(-119999.7), number(1e308), number(float("inf"))
    ('2,440', '−120,000', '1×10³⁰⁸', '∞')
    """
    value = as_float(value)
    if shown := without_digits(value):
        return shown
    if float(value).is_integer() and abs(value) < 1e12:
        text = f"{int(value):,}"
    elif 1e-4 <= abs(value) < 1e12:
        text = f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    else:
        digits, power = f"{value:.3e}".split("e")
        text = f"{digits.rstrip('0').rstrip('.')}×10{str(int(power)).translate(_SUPERSCRIPT)}"
    return text.replace("-", "−")


def resource_name(resource: str) -> str:
    """A resource as a heading has it; one of the user's own by its own name."""
    return RESOURCE_NAMES.get(resource, resource.replace("_", " "))


def in_sentence(heading: str) -> str:
    """A heading as the middle of a sentence has it.

    >>> in_sentence("Added FLOPs")
    'added FLOPs'
    """
    return heading[:1].lower() + heading[1:]


def quantity(resource: str, value: float) -> str:
    """A value with the unit of its resource; "" as resource gives the bare number.

    >>> quantity("flops", 1.5e9), quantity("vram_gb", 4e-5), quantity("latency_ms", 0.25), quantity("latency_ms", 0)
    ('1.5 GFLOP', '40 kB', '0.25 ms', '0 ms')
    """
    value = as_float(value)
    if resource == "flops":
        return _scaled(value, "FLOP")
    if resource == "vram_gb":
        return _scaled(1e9 * value, "B") if abs(value) < MOST_DIGITS else f"{number(value)} GB"
    if resource in ("latency_ms", "step_ms"):
        if abs(value) >= MOST_DIGITS or without_digits(value):
            return f"{number(value)} ms"
        return f"{value:.3g} ms".replace("-", "−") if abs(value) < 1000 else f"{number(round(value))} ms"
    return number(value)


def _scaled(value: float, unit: str) -> str:
    amount, prefix = prefixed(value)
    return f"{number(float(f'{amount:.4g}'))} {prefix}{unit}"


def percent(share: float, digits: int = 1) -> str:
    """A share of 1 in percent; small ones are not rounded to nothing.

    >>> percent(0.5), percent(0.00012), percent(0.0), percent(2e-6, digits=4), percent(3e-14), percent(1.0, digits=0)
    ('50 %', '0.012 %', '0 %', '0.0002 %', '< 0.0001 %', '100 %')
    """
    value = 100 * as_float(share)
    if without_digits(value) or abs(value) >= MOST_DIGITS:
        return f"{number(value)} %"
    if 0 < abs(value) < 1e-4:
        return "< 0.0001 %"
    if value != 0 and abs(value) < 10.0**-digits:
        return f"{value:.2g} %".replace("-", "−")
    text = f"{value:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if digits else text).replace("-", "−") + " %"


def signed_percent(share: float) -> str:
    """A relative error, with its sign.

    >>> signed_percent(0.031), signed_percent(-0.2), signed_percent(0)
    ('+3.1 %', '−20 %', '0 %')
    """
    text = percent(share)
    return text if text.startswith("−") or share == 0 else "+" + text
