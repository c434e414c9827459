"""Amounts as people write them: ``300k`` parameters, ``8GB`` of memory, ``20ms``. One parser for files and options."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

_AMOUNT = re.compile(r"(?P<number>[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<unit>[a-zµμ]*)", re.IGNORECASE)
_COUNTS = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12, "p": 10**15}
_BYTES = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_BYTES |= {"m": 10**6, "g": 10**9, "t": 10**12}
_MOST_DIGITS = 30
_SECONDS = {"ns": Decimal("1e-9"), "us": Decimal("1e-6"), "µs": Decimal("1e-6"), "ms": Decimal("1e-3"), "s": Decimal(1)}


@dataclass(frozen=True)
class Quantity:
    """A kind of amount.

    Args:
        units: lower-case unit -> its size, in the smallest unit that is exact.
        one: size of the unit that a plain number is in, and that amounts are recorded in.
        examples: what would work, for messages.
    """

    units: dict[str, Decimal]
    one: Decimal
    examples: str

    def parse(self, text: str) -> int | float:
        """The amount, exactly where it is a whole number.

        >>> COUNT.parse("1.5M"), MEMORY.parse("512MB"), TIME.parse("0.5s"), COUNT.parse("60_000")
        (1500000, 0.512, 500, 60000)

        Raises:
            ValueError: the text is not a quantity, or has more than 30 digits. The message does not repeat the text.
        """
        found = _AMOUNT.fullmatch(text.strip())
        unit = found["unit"].lower().replace("μ", "µ") if found else ""
        if found is None or (unit and unit not in self.units):
            raise ValueError(f"must be a number such as {self.examples}")
        amount = Decimal(found["number"].replace("_", ""))
        if amount.adjusted() > _MOST_DIGITS:
            raise ValueError(f"is too large; give a number such as {self.examples}")
        amount = amount * self.units[unit] / self.one if unit else amount
        return int(amount) if amount == amount.to_integral_value() else float(amount)

    @property
    def pattern(self) -> str:
        """A regular expression for JSON Schema: a number with one of the units, in upper or lower case."""
        units = "|".join("".join(f"[{c.upper()}{c}]" if c.isascii() else c for c in unit) for unit in self.units)
        return rf"^\s*[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?\s*({units})?\s*$"


def _quantity(units: dict[str, int] | dict[str, Decimal], one: str, examples: str) -> Quantity:
    sizes = {unit: Decimal(size) for unit, size in units.items()}
    return Quantity(sizes, sizes.get(one, Decimal(1)), examples)


COUNT = _quantity(_COUNTS, "", "300000, 300k or 1.5M")
"""Parameters and FLOPs; ``B`` and ``G`` are both 1e9."""
MEMORY = _quantity(_BYTES, "gb", "0.5, 512MB, 8GB or 8GiB (without a unit: GB, 1e9 bytes)")
TIME = _quantity(_SECONDS, "ms", "20, 20ms or 0.5s (without a unit: ms)")
