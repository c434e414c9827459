"""Traces: exact ones of explicit matrices, and Hutchinson's estimate with its generator."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerlens.kernels import hutchinson_trace, matrix_traces, rademacher, reference


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


def test_the_estimate_covers_the_trace_and_equals_the_twin() -> None:
    generator = np.random.default_rng(0)
    root = generator.standard_normal((60, 60))
    matrix = root @ root.T
    found = hutchinson_trace(lambda z: matrix @ z, 60, probes=400, seed=3, dtype="float64")
    expected = reference.hutchinson_trace(lambda z: matrix @ z, 60, probes=400, seed=3)
    assert found.trace == pytest.approx(expected.trace, rel=1e-12)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-9)
    assert abs(found.trace - np.trace(matrix)) < 5 * found.standard_error
    off_diagonal = matrix - np.diag(np.diag(matrix))
    # Of 400 probes the standard error is known to 1 / sqrt(800); five times that is 18 %.
    assert found.standard_error == pytest.approx(math.sqrt(2 * (off_diagonal**2).sum() / 400), rel=0.18)


def test_torch_products_strided_results_and_a_single_probe() -> None:
    matrix = torch.diag(torch.arange(10.0))
    assert hutchinson_trace(lambda z: matrix @ torch.from_numpy(z), 10, probes=3).trace == 45.0
    doubled = np.zeros(20)

    def apply(z: np.ndarray) -> np.ndarray:
        doubled[::2] = 3.0 * z
        return doubled[::2]

    single = hutchinson_trace(apply, 10, probes=1)
    assert single.trace == 30.0
    assert math.isnan(single.standard_error)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: hutchinson_trace(lambda z: z[:-1], 5), ValueError, r"apply must return shape \(5,\), got \(4,\)"),
        (
            lambda: hutchinson_trace(lambda z: z.astype(np.float16), 5),
            TypeError,
            "must be float32 or float64, got float16",
        ),
        (lambda: hutchinson_trace(lambda z: z, 5, probes=0), ValueError, "probes must be at least 1, got 0"),
        (lambda: rademacher(5, seed=-1), ValueError, "seed must be between 0 and 2.64 - 1, got -1"),
        (lambda: rademacher(-5, seed=1), ValueError, "size must not be negative"),
        (lambda: rademacher(5, seed=1, dtype="int8"), ValueError, "dtype must be 'float32' or 'float64', got 'int8'"),
        (lambda: matrix_traces([np.eye(2), np.ones((2, 3))]), ValueError, r"matrices\[1\] must be square.*\(2, 3\)"),
        (lambda: matrix_traces([np.ones(3)]), ValueError, r"matrices\[0\] must have the two axes \[n, n\]"),
    ],
)
def test_wrong_arguments_are_refused(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("threads", [1, 2])
def test_matrix_traces(isa: str, threads: int) -> None:
    generator = np.random.default_rng(0)
    matrices = [
        generator.standard_normal((40, 40)),
        generator.standard_normal((7, 7)).astype(np.float32).T,
        torch.from_numpy(generator.standard_normal((9, 9))).bfloat16(),
        np.empty((0, 0)),
        generator.standard_normal((1200, 1200))[::-2, ::2],
    ]
    found, expected = matrix_traces(matrices, threads=threads), reference.matrix_traces(matrices)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[[0, 4]], expected[[0, 4]], rtol=0, atol=1e-11)
