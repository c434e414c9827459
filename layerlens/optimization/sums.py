"""Correctly rounded sums that do not raise where the total is beyond float64."""

from __future__ import annotations

import math
from collections.abc import Iterable


def exact_sum(values: Iterable[float]) -> float:
    """math.fsum, but infinity where a total of finite numbers overflows.

    >>> exact_sum([0.1] * 10)
    1.0
    """
    values = list(values)
    try:
        return math.fsum(values)
    except OverflowError:
        return math.copysign(math.inf, sum(math.ldexp(value, -64) for value in values))
