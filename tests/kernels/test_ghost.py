"""Ghost norms and Gram matrices: equal to brute force on the per-sample gradients, in every form and layout."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_samples import DTYPES, bits

from layerlens.kernels import _dispatch, available_isas, ghost_form, ghost_gram, ghost_norms, reference

# Around the tiles: 4 x 4 tokens, 16 and 32 features (AVX-512), 6 and 8 rows; 1 token is a case of its own.
SHAPES = [
    (3, 1, 5, 7),
    (2, 2, 1, 1),
    (2, 3, 16, 8),
    (2, 4, 17, 33),
    (3, 5, 31, 6),
    (1, 9, 100, 50),
    (2, 33, 48, 64),
    (2, 64, 65, 31),
]


def sequences(batch: int, tokens: int, d_in: int, d_out: int, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = np.random.default_rng([batch, tokens, d_in, d_out])
    h = generator.standard_normal((batch, tokens, d_in))
    d = generator.standard_normal((batch, tokens, d_out)) * 1e-3
    d[:, tokens - tokens // 4 :] = 0.0  # padding
    return torch.from_numpy(h).to(DTYPES[dtype]), torch.from_numpy(d).to(DTYPES[dtype])


def bound(h: torch.Tensor, d: torch.Tensor) -> np.ndarray:
    """Of the absolute error of each norm, [batch], in units of | |D|^T |H| |_F^2.

    Gram form: a product of two dot products of length d_in and d_out, each with as many roundings of u as terms at
    most. Direct form: an element has `tokens` roundings, its square twice as many relative ones. Either is at most
    (max(d_in + d_out, 2 tokens)) u sum_{t,s} (|d_t| . |d_s|) (|h_t| . |h_s|) to first order; 8 u for what follows.
    """
    unit = 2.0**-53 if torch.float64 in (h.dtype, d.dtype) else 2.0**-24
    terms = max(h.shape[-1] + d.shape[-1], 2 * h.shape[1]) + 8
    return terms * unit * reference.ghost_norms(h.abs(), d.abs())


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_equal_the_twin(isa: str, dtype: str) -> None:
    for shape in SHAPES:
        h, d = sequences(*shape, dtype)
        expected, limits = reference.ghost_norms(h, d), bound(h, d)
        for form in ("auto", "gram", "direct"):
            for threads in (1, 2):
                found = ghost_norms(h, d, form=form, threads=threads)
                assert np.all(np.abs(found - expected) <= limits), (shape, form, threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_matrix_equals_the_twin(isa: str, dtype: str) -> None:
    for shape in SHAPES:
        h, d = sequences(*shape, dtype)
        expected, limits = reference.ghost_gram(h, d), bound(h, d)
        for threads in (1, 2):
            found = ghost_gram(h, d, threads=threads)
            assert np.all(np.abs(found - expected) <= np.sqrt(np.outer(limits, limits))), (shape, threads)
            np.testing.assert_array_equal(found, found.T)


@pytest.mark.parametrize("form", ["gram", "direct"])
def test_relative_error_of_a_realistic_layer_is_below_1e_6(isa: str, form: str) -> None:
    h, d = sequences(4, 96, 384, 384, "float32")
    np.testing.assert_allclose(ghost_norms(h, d, form=form), reference.ghost_norms(h, d), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["auto", "gram", "direct"])
def test_same_bits_for_every_thread_count_and_layout(isa: str, dtype: str, form: str) -> None:
    h, d = sequences(9, 40, 70, 90, dtype)
    wide = torch.zeros(9, 41, 140, dtype=h.dtype)
    spread = wide[:, 1:, ::2]
    spread.copy_(h)
    features_first = d.transpose(1, 2).contiguous().transpose(1, 2)
    norms = {
        bits(ghost_norms(left, right, form=form, threads=threads))
        for left in (h, spread)
        for right in (d, features_first)
        for threads in (1, 2, 3)
    }
    assert len(norms) == 1
    assert len({bits(ghost_gram(spread, features_first, threads=threads)) for threads in (1, 2, 3)}) == 1


def test_the_forms_and_brute_force_autograd_agree() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 10, bias=False)
    h = torch.randn(5, 7, 24)
    expected = []
    for sample in h:
        layer.weight.grad = None
        layer(sample).tanh().square().sum().backward()
        expected.append(float(layer.weight.grad.double().square().sum()))
    y = layer(h).detach().requires_grad_()
    (d,) = torch.autograd.grad(y.tanh().square().sum(), y)
    for form in ("gram", "direct"):
        np.testing.assert_allclose(ghost_norms(h, d, form=form), expected, rtol=1e-5)


@pytest.mark.parametrize("form", ["auto", "gram", "direct"])
@pytest.mark.parametrize(
    ("h_scale", "d_scale"), [(1e-30, 1.0), (1.0, 1e-25), (1e-20, 1e-20), (1e25, 1e-3), (1e18, 1e18)]
)
def test_values_whose_squares_leave_the_range_of_float32(isa: str, form: str, h_scale: float, d_scale: float) -> None:
    h, d = sequences(3, 20, 30, 40, "float64")
    h, d = (h * h_scale).float(), (d * d_scale).float()
    np.testing.assert_allclose(ghost_norms(h, d, form=form), reference.ghost_norms(h, d), rtol=1e-5)
    expected = reference.ghost_gram(h, d)
    np.testing.assert_allclose(ghost_gram(h, d), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("form", ["auto", "gram", "direct"])
def test_zero_gradients_have_zero_norm_and_nan_comes_through(isa: str, form: str) -> None:
    h, d = sequences(4, 6, 20, 20, "float32")
    d[1], h[2], d[3, 2, 1] = 0.0, 0.0, math.nan
    found = ghost_norms(h, d, form=form)
    assert found[0] > 0
    assert found[1] == found[2] == 0.0
    assert math.isnan(found[3])
    gram = ghost_gram(h[:3], d[:3])
    assert np.all(gram[1:] == 0.0)


def test_types_may_be_mixed() -> None:
    h, d = sequences(2, 5, 18, 22, "float64")
    for left, right in ((h.bfloat16(), d), (h, d.half()), (h.float(), d.bfloat16())):
        np.testing.assert_allclose(ghost_norms(left, right), reference.ghost_norms(left, right), rtol=1e-6)


def test_no_tokens_features_or_samples() -> None:
    assert ghost_norms(np.empty((0, 3, 4)), np.empty((0, 3, 5))).shape == (0,)
    assert ghost_gram(np.empty((0, 3, 4)), np.empty((0, 3, 5))).shape == (0, 0)
    for h, d in (((2, 0, 4), (2, 0, 5)), ((2, 3, 0), (2, 3, 5)), ((2, 3, 4), (2, 3, 0)), ((2, 0), (2, 5))):
        assert ghost_norms(np.empty(h), np.empty(d)).tolist() == [0.0, 0.0]
        assert ghost_gram(np.empty(h), np.empty(d)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("function", [ghost_norms, ghost_gram])
@pytest.mark.parametrize(
    ("h", "d", "message"),
    [
        ((2, 3, 4), (3, 3, 4), r"same batch and tokens, got shapes \(2, 3, 4\) and \(3, 3, 4\)"),
        ((2, 3, 4), (2, 5, 4), "same batch and tokens"),
        ((2, 4), (2, 1, 4), "same batch and tokens"),
        ((4,), (4,), r"inputs must have the axes \[batch, tokens, features\] or \[batch, features\], got shape \(4,\)"),
        ((2, 3, 4), (2, 3, 4, 1), "output_gradients must have the axes"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(function, h: tuple[int, ...], d: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(np.ones(h), np.ones(d))


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="form must be 'auto', 'gram' or 'direct', got 'fast'"):
        ghost_norms(np.ones((1, 2, 3)), np.ones((1, 2, 3)), form="fast")


def test_the_cheaper_form_is_taken() -> None:
    assert ghost_form(1, 8, 8) == "gram"
    assert ghost_form(128, 768, 3072) == "gram"
    assert ghost_form(4096, 768, 768) == "direct"
    assert ghost_form(64, 3, 64) == "direct"


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(["auto", "gram", "direct"]),
    st.sampled_from(available_isas()),
    st.integers(0, 2**32),
)
def test_any_shape(batch: int, tokens: int, d_in: int, d_out: int, form: str, name: str, seed: int) -> None:
    """Small integers: every product and sum is exact in float32, so the result must be too."""
    generator = np.random.default_rng(seed)
    h = generator.integers(-3, 4, (batch, tokens, d_in)).astype(np.float32)
    d = generator.integers(-3, 4, (batch, tokens, d_out)).astype(np.float32)
    _dispatch._force(name)
    try:
        np.testing.assert_array_equal(ghost_norms(h, d, form=form), reference.ghost_norms(h, d))
        np.testing.assert_array_equal(ghost_gram(h, d), reference.ghost_gram(h, d))
    finally:
        _dispatch._force(None)
