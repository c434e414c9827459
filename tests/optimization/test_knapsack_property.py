"""Scoring, favourites and hulls against their twins on inputs that hypothesis makes awkward: ties, zeros, extremes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from layerlens.kernels import _dispatch, reference
from layerlens.kernels._knapsack import Instance, group_hulls

# Sizes around the vector widths (2, 4, 8) and their unrolled steps, groups of one option included.
SIZES = st.lists(st.integers(1, 19), min_size=1, max_size=8)
# Few numbers, so that ties and equal options are common, and the corners of float64: zero, subnormal, huge.
AMOUNTS = st.sampled_from([0.0, 1.0, 1.0, 2.0, 3.0, 0.1, 1e-9, 5e-324, 1e-300, 1e300]) | st.floats(0.0, 1e300)
VALUES = AMOUNTS | st.floats(-1e300, 1e300) | st.just(-np.inf)


def column(draw, elements, n):
    return np.array(draw(st.lists(elements, min_size=int(n), max_size=int(n))), dtype=np.float64)


@st.composite
def instances(draw):
    """Offset, value, cost rows and prices; the first option of each group has a finite value."""
    offset = np.concatenate(([0], np.cumsum(draw(SIZES))))
    n_resources = draw(st.integers(0, 5))
    value = column(draw, VALUES, offset[-1])
    value[offset[:-1]] = np.maximum(value[offset[:-1]], 0.0)
    rows = [column(draw, AMOUNTS, offset[-1]) for _ in range(n_resources)]
    return offset, value, rows, column(draw, AMOUNTS, n_resources)


@settings(max_examples=150, deadline=None)
@given(instances(), st.integers(1, 3))
def test_scores_and_favourites_have_the_twins_bits(instance, threads):
    offset, value, rows, price = instance
    with np.errstate(over="ignore", under="ignore"):  # a price times a cost may be infinite: then so is the score
        wanted = reference.score_groups(offset, value, rows, price)
    try:
        for isa in _dispatch.available_isas():
            _dispatch._force(isa)
            found = Instance(offset, value, rows, np.ones(len(rows))).score_groups(price, threads)
            assert [array.tobytes() for array in found] == [array.tobytes() for array in wanted], isa
    finally:
        _dispatch._force(None)


@st.composite
def points(draw):
    """Values and costs whose products are exact: integers of 20 bits times a power of two, which may be extreme."""
    offset = np.concatenate(([0], np.cumsum(draw(SIZES))))
    exponents = st.just(0) | st.integers(-1074, 1000)
    most = draw(st.sampled_from([1, 3, 40, 1 << 20]))
    integers = st.integers(0, most) if draw(st.booleans()) else st.integers(-most, most)
    value, cost = (column(draw, numbers, offset[-1]) for numbers in (integers, st.integers(0, most)))
    return offset, np.ldexp(value, draw(exponents)), np.ldexp(cost, draw(exponents))


@settings(max_examples=300, deadline=None)
@given(points(), st.integers(1, 3))
@example((np.array([0, 3]), np.array([0.0, 1e200, 1.5e200]), np.array([0.0, 1e200, 2e200])), 1)
@example((np.array([0, 3]), np.array([0.0, 1e-200, 1.5e-200]), np.array([0.0, 1e-200, 2e-200])), 1)
def test_hulls_are_the_twins(case, threads):
    offset, value, cost = case
    hull, length = group_hulls(offset, value, cost, threads)
    wanted, wanted_length = reference.group_hulls(offset, value, cost)
    assert length.tolist() == wanted_length.tolist()
    assert hull.tolist() == wanted.tolist()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(-1e9, 1e9), st.floats(0.0, 1e12)), min_size=1, max_size=40))
def test_no_option_lies_above_a_hull_of_any_floats(options):
    """What a rounded comparison drops lies above the line by its error at most, and each drop may add to the next.

    Three roundings on each side (two differences, a product) of relative size u = 2^-53 put a dropped point above its
    line by at most 6u (1 + 6u) of the rise, which is at most the range of the values.
    """
    value, cost = (np.array(column, dtype=np.float64) for column in zip(*options, strict=True))
    hull, _ = group_hulls(np.array([0, len(value)]), value, cost)
    c, v = ([Fraction(float(x)) for x in array] for array in (cost, value))
    assert c[hull[0]] == min(c)
    assert v[hull[-1]] == max(v)
    allowed = len(options) * (max(v) - min(v)) * Fraction(7, 2**53)
    for option in range(len(options)):
        left = max(k for k in range(len(hull)) if c[hull[k]] <= c[option])
        a, b = hull[left], hull[min(left + 1, len(hull) - 1)]
        line = v[a] if a == b else v[a] + (v[b] - v[a]) * (c[option] - c[a]) / (c[b] - c[a])
        assert v[option] <= line + allowed


@pytest.mark.parametrize("scale", [5e-324, 1e-300, 1.0, 1e300])
def test_one_option_and_equal_options(scale):
    assert [array.tolist() for array in group_hulls(np.array([0, 1]), np.array([scale]), np.array([0.0]))] == [[0], [1]]
    offset, equal = np.array([0, 5, 9]), np.full(9, scale)
    assert [array.tolist() for array in group_hulls(offset, equal, equal)] == [[0, 5], [1, 1]]
    choice, best, _ = Instance(offset, equal, [equal], [1.0]).score_groups(np.zeros(1))
    assert (choice.tolist(), best.tolist()) == ([0, 5], [scale, scale])
