"""Trace and diagonal of the empirical Fisher: equal to the twin, reproducible, and careful with the caller's buffer."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from kernel_samples import DTYPES, bits, matrix, relative_bound

from layerlens.kernels import _dispatch, available_isas, fisher_diagonal, fisher_trace, reference

# Around 16 columns per step and 1024 per tile; around 8 samples taken together.
COLUMNS = (0, 1, 7, 15, 16, 17, 100, 1023, 1024, 1025, 3000)
SAMPLES = (1, 2, 7, 8, 9, 20)


def diagonal_bound(samples: int) -> float:
    """Each column: one rounding per square (float64 only), `samples` additions, the scale, the addition to out."""
    return (samples + 3) * 2.0**-53


@pytest.mark.parametrize("dtype", DTYPES)
def test_diagonal_equals_the_twin(isa: str, dtype: str) -> None:
    for samples, cols in itertools.product(SAMPLES, COLUMNS):
        g = matrix(samples, cols, dtype)
        expected = reference.fisher_diagonal(g, np.linspace(0.0, 1.0, cols))
        for threads in (1, 2):
            out = np.linspace(0.0, 1.0, cols)
            returned = fisher_diagonal(g, out, threads=threads)
            assert returned is out
            # The twin errs by as much as the kernel may.
            this = f"{samples} samples of {cols} columns, {threads} threads"
            np.testing.assert_allclose(out, expected, rtol=2 * diagonal_bound(samples), atol=0, err_msg=this)


def test_a_call_that_tries_all_ways_to_read_has_the_bits_of_calls_that_try_none() -> None:
    # From 32 MiB on (cpp/common/reading.hpp), here 12 bytes for a column: 36 MiB in one call and 9 in each of four.
    g = torch.randn(1, 3 * 2**20, generator=torch.Generator().manual_seed(0))
    whole, parts = np.zeros(g.shape[1]), np.zeros(g.shape[1])
    fisher_diagonal(g, whole)
    step = g.shape[1] // 4
    for begin in range(0, g.shape[1], step):
        fisher_diagonal(g[:, begin : begin + step], parts[begin : begin + step])
    assert bits(whole) == bits(parts)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("samples", "cols"), [(1, 1), (3, 700), (16, 40_000)])
def test_trace_equals_the_twin(isa: str, dtype: str, samples: int, cols: int, threads: int) -> None:
    g = matrix(samples, cols, dtype)
    bound = relative_bound(dtype, cols) + (samples + 1) * 2.0**-53
    assert fisher_trace(g, threads=threads) == pytest.approx(reference.fisher_trace(g), rel=bound)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_every_isa_thread_count_and_layout(dtype: str) -> None:
    g = matrix(19, 5003, dtype)
    spread = torch.zeros(19 * 2, 5003 * 2, dtype=g.dtype)[::2, ::2]
    spread.copy_(g)
    seen = set()
    try:
        for name in available_isas():
            _dispatch._force(name)
            for threads in (1, 2, 3):
                for layout in (g, spread, g.T.contiguous().T):
                    diagonal = fisher_diagonal(layout, threads=threads)
                    seen.add(bits(diagonal, fisher_trace(layout, threads=threads)))
    finally:
        _dispatch._force(None)
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_diagonal_into_float32_equals_the_twin(isa: str, dtype: str) -> None:
    for samples, cols in itertools.product(SAMPLES, COLUMNS):
        g = matrix(samples, cols, dtype)
        expected = reference.fisher_diagonal(g, np.linspace(0.0, 1.0, cols, dtype=np.float32))
        for threads in (1, 2):
            out = np.linspace(0.0, 1.0, cols, dtype=np.float32)
            assert fisher_diagonal(g, out, threads=threads) is out
            assert out.dtype == expected.dtype == np.float32
            # What is added differs by at most an ulp (float64 values that nearly agree, rounded), so the exact sums
            # differ by at most an ulp of the result, which two roundings to nearest can make two.
            np.testing.assert_array_max_ulp(out, expected, maxulp=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_float32_for_every_isa_thread_count_and_layout(dtype: str) -> None:
    seen = set()
    try:
        for name in available_isas():
            _dispatch._force(name)
            for samples in (1, 5, 19):
                g = matrix(19, 5003, dtype)
                for threads in (1, 2, 3):
                    for layout in (g[:samples], g.T.contiguous().T[:samples]):
                        out = np.linspace(0.0, 1.0, 5003, dtype=np.float32)
                        seen.add((samples, bits(fisher_diagonal(layout, out, scale=0.1, threads=threads))))
    finally:
        _dispatch._force(None)
    assert len(seen) == 3


def test_a_float32_sum_over_calls_errs_by_a_rounding_per_call(isa: str) -> None:
    calls = 50
    g = matrix(calls, 2000, "float32")
    out, exact = np.zeros(2000, dtype=np.float32), np.zeros(2000)
    for row in g:
        fisher_diagonal(row[None], out, scale=1 / calls)
        fisher_diagonal(row[None], exact, scale=1 / calls)
    error = np.abs(out - exact) / exact
    assert error.max() <= calls * 2.0**-24
    # That it is float32 which is tested: float64 sums would be exact to 1e-14.
    assert error.max() > 2.0**-26


def test_float32_sums_outside_the_range_of_float32_squares(isa: str) -> None:
    """Squares are float64: 1e-30 squared, scaled by 1e30, is an ordinary float32, and 1e200 is not."""
    g, out = np.array([[1e-30, 1e25]], dtype=np.float32), np.zeros(2, dtype=np.float32)
    fisher_diagonal(g, out, scale=1e30)
    assert out[0] == pytest.approx(1e-30, rel=1e-6)
    assert out[1] == np.inf


def test_diagonal_sums_to_the_trace() -> None:
    g = matrix(6, 999, "float64")
    assert fisher_diagonal(g).sum() == pytest.approx(fisher_trace(g), rel=1e-13)


def test_batches_with_a_common_scale_add_up_to_the_whole() -> None:
    g = matrix(10, 50, "float32")
    out = np.zeros(50)
    for batch in (g[:3], g[3:4], g[4:]):
        fisher_diagonal(batch, out, scale=1 / 10)
    np.testing.assert_allclose(out, fisher_diagonal(g), rtol=20 * 2.0**-53)


def test_diagonal_writes_into_a_torch_buffer() -> None:
    g, out = matrix(4, 33, "bfloat16"), torch.ones(33, dtype=torch.float64)
    assert fisher_diagonal(g, out) is out
    np.testing.assert_array_equal(out.numpy(), fisher_diagonal(g, np.ones(33)))


def test_small_and_large_values_do_not_leave_the_range(isa: str) -> None:
    g = np.array([[1e-30, 1e30], [2e-30, 2e30]], dtype=np.float32)
    np.testing.assert_allclose(fisher_diagonal(g), np.square(g.astype(np.float64)).mean(axis=0), rtol=1e-15)


def test_nan_stays_in_its_column(isa: str) -> None:
    g = np.ones((9, 40), dtype=np.float32)
    g[8, 17] = math.nan
    assert np.flatnonzero(np.isnan(fisher_diagonal(g))).tolist() == [17]
    assert math.isnan(fisher_trace(g))


def read_only() -> np.ndarray:
    out = np.zeros(3)
    out.flags.writeable = False
    return out


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (np.zeros(3, dtype=np.float16), TypeError, "out must be float64 or float32, got float16"),
        (np.zeros(4), ValueError, r"out must have shape \(3,\).*got \(4,\)"),
        (np.zeros((1, 3)), ValueError, r"got \(1, 3\)"),
        (np.zeros(6)[::2], ValueError, "out must be contiguous"),
        (np.zeros(6, dtype=np.float32)[::2], ValueError, "out must be contiguous, got a stride of 8 bytes"),
        (read_only(), ValueError, "out is read-only"),
        ([0.0, 0.0, 0.0], TypeError, "out must be a NumPy array.*got list"),
    ],
)
def test_outputs_that_cannot_be_written_are_refused(out: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fisher_diagonal(np.ones((2, 3)), out)


def test_an_output_inside_the_input_is_refused() -> None:
    g = np.ones((4, 3))
    with pytest.raises(ValueError, match="shares memory"):
        fisher_diagonal(g[:, ::-1], g[2])


@pytest.mark.parametrize("function", [fisher_trace, fisher_diagonal])
def test_no_samples_and_wrong_ranks_are_refused(function) -> None:
    with pytest.raises(ValueError, match=r"g has shape \(0, 5\)"):
        function(np.empty((0, 5)))
    with pytest.raises(
        ValueError, match=r"\[samples, parameters\], got 1 \(shape \(5,\)\); for a single row pass g\[None"
    ):
        function(np.ones(5))


def test_a_scale_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="scale must be finite, got nan"):
        fisher_diagonal(np.ones((2, 3)), scale=math.nan)


def test_no_parameters_give_an_empty_diagonal_and_no_trace() -> None:
    assert fisher_diagonal(np.empty((3, 0))).shape == (0,)
    assert fisher_trace(np.empty((3, 0))) == 0.0


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
    st.sampled_from(available_isas()),
)
def test_diagonal_of_any_float32(g: np.ndarray, name: str) -> None:
    _dispatch._force(name)
    try:
        found = fisher_diagonal(g)
    finally:
        _dispatch._force(None)
    for value, column in zip(found, g.T.astype(np.float64), strict=True):
        exact = math.fsum(column * column) / len(column)
        assert abs(value - exact) <= (diagonal_bound(len(column)) + 2.0**-53) * exact
