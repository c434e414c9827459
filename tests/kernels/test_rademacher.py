"""The generator of signs: its twin's values, balanced and uncorrelated, wrong arguments refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerlens.kernels import rademacher, reference


@given(
    st.integers(0, 300), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.sampled_from(["float32", "float64"])
)
def test_signs_equal_the_twin(size: int, seed: int, probe: int, dtype: str) -> None:
    found = rademacher(size, seed=seed, probe=probe, dtype=dtype)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, reference.rademacher(size, seed=seed, probe=probe))


def test_signs_are_balanced_and_uncorrelated() -> None:
    """Means of N independent signs lie within 5 / sqrt(N) of 0 but for one case in 10^6; there are 3 + 28 of them."""
    size = 1 << 16
    signs = np.stack([rademacher(size, seed=1, probe=probe) for probe in range(8)])
    assert np.abs(signs.mean(axis=1)).max() < 5 / math.sqrt(size)
    correlations = signs @ signs.T / size - np.eye(8)
    assert np.abs(correlations).max() < 5 / math.sqrt(size)
    for lag in (1, 63, 64):
        assert abs((signs[0, lag:] * signs[0, :-lag]).mean()) < 5 / math.sqrt(size - lag)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rademacher(5, seed=-1), ValueError, "seed must be between 0 and 2.64 - 1, got -1"),
        (lambda: rademacher(-5, seed=1), ValueError, "size must not be negative"),
        (lambda: rademacher(5, seed=1, dtype="int8"), ValueError, "dtype must be 'float32' or 'float64', got 'int8'"),
    ],
)
def test_wrong_arguments_are_refused(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
