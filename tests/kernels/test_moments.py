"""Row moments and gradient energy: equal to the twin within the derived bound, and to themselves bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from kernel_samples import AWKWARD_LENGTHS, DTYPES, bits, matrix, relative_bound

from layerlens.kernels import (
    _dispatch,
    available_isas,
    gradient_energy,
    reference,
    row_moments,
    row_statistics,
    row_sum_of_squares,
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_twin(isa: str, dtype: str) -> None:
    for cols in AWKWARD_LENGTHS:
        x = matrix(3, cols, dtype)
        if cols > 2:
            x[1, cols // 2] = 0.0
        expected, bound = reference.row_statistics(x), relative_bound(dtype, cols)
        magnitudes = np.abs(reference.as_float64(x)).sum(axis=1)
        for threads in (1, 2):
            this = f"{cols} columns, {threads} threads"
            found = row_statistics(x, threads=threads)
            assert np.all(np.abs(found.sum - expected.sum) <= bound * magnitudes), this
            assert np.all(np.abs(found.sum_of_squares - expected.sum_of_squares) <= bound * expected.sum_of_squares), (
                this
            )
            np.testing.assert_array_equal(found.max_abs, expected.max_abs, err_msg=this)
            np.testing.assert_array_equal(found.non_finite, expected.non_finite, err_msg=this)
            np.testing.assert_array_equal(found.zeros, expected.zeros, err_msg=this)
            energy = gradient_energy(x, threads=threads)
            assert energy == pytest.approx(expected.sum_of_squares.sum(), rel=bound), this


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols"), [(5, 40), (7, 513), (3, 100_003), (200, 333)])
def test_same_bits_for_every_isa_thread_count_layout_and_entry_point(dtype: str, rows: int, cols: int) -> None:
    x = matrix(rows, cols, dtype)
    spread = torch.zeros(rows * 2, cols * 3, dtype=x.dtype)[::2, 1::3]
    spread.copy_(x)
    seen = set()
    try:
        for name in available_isas():
            _dispatch._force(name)
            for threads in (1, 2, 3):
                for layout in (x, spread, x.T.contiguous().T):
                    moments = row_moments(layout, threads=threads)
                    seen.add(bits(*moments))
                    assert bits(moments.sum_of_squares) == bits(row_sum_of_squares(layout, threads=threads))
                seen.add(bits(*moments))
    finally:
        _dispatch._force(None)
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_call_that_tries_all_ways_to_read_has_the_bits_of_calls_that_try_none(dtype: str) -> None:
    # From 32 MiB on (cpp/common/reading.hpp): 36 MiB in one call and 9 in each of four, rows below and above a chunk.
    values = torch.randn(9 * 2**18, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    x = values.repeat(36 * 2**20 // values.nbytes)
    for cols in (4096, 36864):
        rows = x.view(-1, cols)
        parts = np.concatenate([row_sum_of_squares(part) for part in rows.split(len(rows) // 4)])
        assert bits(row_sum_of_squares(rows)) == bits(parts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_energy_has_the_same_bits_for_every_isa_and_thread_count(dtype: str) -> None:
    x = matrix(31 * 7, 3001, dtype).reshape(7, 31, 3001)[:, ::2, 5:]
    try:
        seen = set()
        for name in available_isas():
            _dispatch._force(name)
            seen |= {gradient_energy(x, threads=threads) for threads in (1, 2, 5)}
    finally:
        _dispatch._force(None)
    assert len(seen) == 1


def test_a_hundred_million_equal_float32_values_are_right_to_1e_6(isa: str) -> None:
    value = np.float32(0.1)
    x = np.broadcast_to(value, (1, 10**8))
    found = row_moments(x, threads=2)
    assert found.sum[0] == pytest.approx(1e8 * float(value), rel=1e-6)
    assert found.sum_of_squares[0] == pytest.approx(1e8 * float(value) ** 2, rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-22, 1e-19, 1e19, 1e25, 3e37])
def test_squares_outside_the_range_of_float32(isa: str, dtype: str, scale: float) -> None:
    x = torch.from_numpy(np.random.default_rng(0).uniform(0.5, 1.0, (2, 700)) * scale).to(DTYPES[dtype])
    expected = reference.row_moments(x)
    found = row_moments(x)
    np.testing.assert_allclose(found.sum_of_squares, expected.sum_of_squares, rtol=relative_bound(dtype, 700))
    np.testing.assert_allclose(found.sum, expected.sum, rtol=relative_bound(dtype, 700))


def test_float16_of_every_value_is_read_exactly(isa: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(-1, 1)
    expected = every.astype(np.float64)
    found = row_moments(every)
    np.testing.assert_array_equal(found.sum, expected[:, 0])
    np.testing.assert_array_equal(found.max_abs, np.abs(expected[:, 0]))


def test_bfloat16_of_every_value_is_read_exactly(isa: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    tensor = torch.from_numpy(every.view(np.int16)).view(torch.bfloat16).reshape(-1, 1)
    found = row_moments(tensor)
    with np.errstate(invalid="ignore"):  # signalling NaNs are among them
        np.testing.assert_array_equal(found.sum, reference.widen_bfloat16(every).astype(np.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 63, 64, 600, 999])
def test_nan_and_infinity_come_through(isa: str, dtype: str, place: int) -> None:
    x = matrix(3, 1000, dtype)
    x[0, place], x[1, place] = math.nan, -math.inf
    found = row_statistics(x, threads=2)
    assert found.non_finite.tolist() == [1, 1, 0]
    assert np.isnan(found.sum[0])
    assert np.isnan(found.sum_of_squares[0])
    assert np.isnan(found.max_abs[0])
    assert (found.sum[1], found.sum_of_squares[1], found.max_abs[1]) == (-math.inf, math.inf, math.inf)
    assert np.isfinite([found.sum[2], found.sum_of_squares[2], found.max_abs[2]]).all()


def test_nan_in_one_chunk_of_many_reaches_max_abs(isa: str) -> None:
    x = np.ones((1, 100_000), dtype=np.float32)
    x[0, 40_000] = math.nan
    assert np.isnan(row_moments(x).max_abs[0])


def test_empty_matrices_give_empty_or_zero_results() -> None:
    assert all(len(part) == 0 for part in row_moments(np.empty((0, 5), dtype=np.float32)))
    np.testing.assert_array_equal(np.array(row_moments(np.empty((2, 0), dtype=np.float32))), np.zeros((3, 2)))
    assert gradient_energy(np.empty((3, 0, 2))) == 0.0


@pytest.mark.parametrize(
    "take",
    [
        lambda x: x,
        lambda x: x[::-1, :, ::-1],
        lambda x: x[:, ::2, 1:],
        lambda x: x[..., ::3],
        lambda x: x.transpose(2, 0, 1),
        lambda x: x[:, :1, :1],
        lambda x: x[1, 2, 3],
        lambda x: np.broadcast_to(x[:, None], (5, 3, 6, 7)),
        lambda x: x[:, :, None, ::2, None],
    ],
)
def test_energy_of_any_layout(take) -> None:
    x = np.random.default_rng(0).integers(-8, 8, (5, 6, 7)).astype(np.float32)
    part = take(x)
    assert gradient_energy(part, threads=2) == float((part.astype(np.int64) ** 2).sum())


def test_transposed_energy_has_the_same_bits() -> None:
    x = matrix(130, 257, "float32")
    assert gradient_energy(x) == gradient_energy(x.T)


def test_misaligned_memory(isa: str) -> None:
    raw = np.zeros(4 * 1000 + 3, dtype=np.uint8)
    for offset in (1, 2, 3):
        x = np.frombuffer(raw[offset : offset + 4000].data, dtype=np.float32).reshape(2, 500)
        raw[offset : offset + 4000] = np.arange(1000, dtype=np.float32).view(np.uint8)
        assert row_moments(x).sum.sum() == 999 * 500
    record = np.zeros((4, 70), dtype=np.dtype([("tag", "u1"), ("value", "<f8")]))
    record["value"] = 2.0
    np.testing.assert_array_equal(row_sum_of_squares(record["value"]), np.full(4, 280.0))


def test_more_than_two_to_the_31_elements() -> None:
    many = np.broadcast_to(np.ones(2048, dtype=np.float16), ((1 << 20) + 1, 2048))
    assert gradient_energy(many, threads=1) == float(many.size)
    assert many.size > 1 << 31
    far_apart = np.lib.stride_tricks.as_strided(np.zeros((1 << 31) + 8, np.uint8), ((2, 8)), ((1 << 31), 1))
    far_apart[1] = 1
    # Two rows two gibibytes apart (untouched memory costs nothing): offsets beyond 32 bits.
    assert list(row_moments(far_apart.view(np.float64)).max_abs != 0) == [False, True]


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=80),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True),
    ),
    st.sampled_from(available_isas()),
)
def test_any_finite_float32(x: np.ndarray, name: str) -> None:
    _dispatch._force(name)
    try:
        found = row_moments(x)
    finally:
        _dispatch._force(None)
    bound = relative_bound("float32", x.shape[1])
    for row, total, squares, top in zip(x.astype(np.float64), *found, strict=True):
        exact = math.fsum(row * row)
        assert abs(squares - exact) <= bound * exact
        assert abs(total - math.fsum(row)) <= bound * math.fsum(abs(row))
        assert top == max(abs(row), default=0.0)


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(
        np.float64,
        hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=9),
        elements=st.floats(min_value=-1e100, max_value=1e100),
    ),
    st.data(),
)
def test_energy_of_any_float64_array_and_slice(x: np.ndarray, data: st.DataObject) -> None:
    part = x[data.draw(hnp.basic_indices(x.shape))]
    exact = math.fsum(value * value for value in np.asarray(part).ravel().tolist())
    # Squares that underflow lose at most 2^-1075 each, and there are at most 9^4.
    assert abs(gradient_energy(np.asarray(part)) - exact) <= 6561 * 2.0**-1074 + relative_bound("float64", 6561) * exact
