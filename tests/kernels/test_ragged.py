"""Many tensors of different sizes in one call: the same as one call each, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from kernel_samples import DTYPES, bits, matrix

from layerlens.kernels import (
    _dispatch,
    available_isas,
    gradient_energy,
    matrix_traces,
    ragged_statistics,
    ragged_sum_of_squares,
    reference,
)


def tensors() -> list[torch.Tensor]:
    """Parameters of many shapes in every type: vectors, matrices above one chunk, empty, transposed, sliced."""
    found = []
    for dtype in DTYPES:
        found += [
            matrix(1, 768, dtype)[0],
            matrix(300, 257, dtype),
            matrix(6, 60, dtype).reshape(3, 4, 5, 6),
            matrix(0, 5, dtype),
            matrix(257, 300, dtype).T,
            matrix(40, 60, dtype).reshape(4, 10, 60)[:, 1:, ::2],
            matrix(1, 1, dtype)[0, 0],
        ]
    return found


@pytest.mark.parametrize("threads", [1, 2])
def test_equals_the_twin(isa: str, threads: int) -> None:
    arrays = tensors()
    found, expected = ragged_statistics(arrays, threads=threads), reference.ragged_statistics(arrays)
    np.testing.assert_allclose(found.sum_of_squares, expected.sum_of_squares, rtol=7e-7)
    magnitudes = [np.abs(reference.as_float64(array)).sum() for array in arrays]
    assert np.all(np.abs(found.sum - expected.sum) <= 7e-7 * np.array(magnitudes))
    for exact in ("max_abs", "non_finite", "zeros"):
        np.testing.assert_array_equal(getattr(found, exact), getattr(expected, exact))


def test_same_bits_as_single_calls_on_every_isa_and_thread_count() -> None:
    arrays = tensors()
    seen = set()
    try:
        for name in available_isas():
            _dispatch._force(name)
            seen.add(bits(*(gradient_energy(array) for array in arrays)))
            for threads in (1, 2, 3):
                seen.add(bits(ragged_sum_of_squares(iter(arrays), threads=threads)))
                seen.add(bits(ragged_statistics(arrays, threads=threads).sum_of_squares))
    finally:
        _dispatch._force(None)
    assert len(seen) == 1


def test_non_finite_values_are_counted_where_they_are() -> None:
    arrays = [np.ones((3, 40)), np.full((2, 2), np.nan, dtype=np.float32), np.array([np.inf, 0.0, -0.0, -np.inf])]
    found = ragged_statistics(arrays)
    assert found.non_finite.tolist() == [0, 4, 2]
    assert found.zeros.tolist() == [0, 0, 2]


def test_nothing_gives_nothing() -> None:
    assert ragged_sum_of_squares([]).shape == (0,)
    assert ragged_statistics([]).zeros.shape == (0,)


def test_the_wrong_one_is_named() -> None:
    with pytest.raises(TypeError, match=r"arrays\[1\] has elements of int64"):
        ragged_sum_of_squares([np.ones(3), np.ones(3, dtype=np.int64)])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        hnp.arrays(
            np.float16,
            hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=9),  # larger ones run out of entropy
            elements=st.floats(width=16),
        ),
        max_size=4,
    )
)
def test_any_float16_arrays(arrays: list[np.ndarray]) -> None:
    found = ragged_statistics(arrays)
    for index, array in enumerate(arrays):
        values = array.astype(np.float64).ravel()
        np.testing.assert_allclose(found.sum_of_squares[index], np.square(values).sum(), rtol=7e-7)
        assert found.non_finite[index] == (~np.isfinite(values)).sum()
        assert found.zeros[index] == (values == 0).sum()


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


def test_traces_of_what_is_not_square_are_refused() -> None:
    with pytest.raises(ValueError, match=r"matrices\[1\] must be square.*\(2, 3\)"):
        matrix_traces([np.eye(2), np.ones((2, 3))])
    with pytest.raises(ValueError, match=r"matrices\[0\] must have the two axes \[n, n\]"):
        matrix_traces([np.ones(3)])
