"""Correctly rounded sums that do not raise where the total is beyond float64."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np


def exact_sum(values: np.ndarray | Iterable[float]) -> float:
    """math.fsum, but infinity where a total of finite numbers overflows.

    >>> exact_sum([0.1] * 10)
    1.0
    """
    values = values.tolist() if isinstance(values, np.ndarray) else list(values)
    try:
        return math.fsum(values)
    except OverflowError:
        return math.copysign(math.inf, sum(math.ldexp(value, -64) for value in values))
