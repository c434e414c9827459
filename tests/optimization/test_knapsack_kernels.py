"""The knapsack kernels against their NumPy twin on every instruction set, and the dual against linear programming."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from instances import large_problem
from scipy.optimize import linprog

from layerlens.kernels import _dispatch
from layerlens.kernels._knapsack import Core, Instance, minimise_dual, sum_use, summarise_row
from layerlens.kernels.reference import score_groups


@pytest.fixture(params=_dispatch.available_isas())
def isa(request):
    _dispatch._force(request.param)
    yield request.param
    _dispatch._force(None)


@pytest.mark.parametrize("n_resources", [0, 1, 3, 4, 16])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_scores_equal_the_twin_bit_for_bit(isa, n_resources, threads):
    rng = np.random.default_rng(n_resources)
    sizes = np.concatenate((np.arange(1, 40), rng.integers(1, 70, 161)))  # around the vector widths, several blocks
    offset = np.concatenate(([0], np.cumsum(sizes)))
    value = rng.normal(size=offset[-1])
    value[rng.random(offset[-1]) < 0.1] = -np.inf
    value[offset[:-1]] = 0.25  # every group keeps a finite value
    rows = [rng.choice([0.0, 0.5, 1.0, 1e-9, 3e8], offset[-1]) for _ in range(n_resources)]
    price = rng.random(n_resources) * rng.choice([0.0, 1.0], n_resources)
    found = Instance(offset, value, rows, np.ones(n_resources)).score_groups(price, threads)
    for got, wanted in zip(found, score_groups(offset, value, rows, price), strict=True):
        assert np.array_equal(got, wanted)


def test_the_first_of_equal_options_wins(isa):
    for size in range(1, 35):
        for first in range(size):
            value = np.zeros(size)
            value[first:] = 1.0
            choice, best, _ = Instance([0, size], value, [np.zeros(size)], [1.0]).score_groups(np.ones(1))
            assert (choice[0], best[0]) == (first, 1.0)


@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("n_resources", [1, 2, 4, 7])
def test_dual_equals_the_linear_program(n_resources, correlated):
    """The Lagrangian bound of this problem equals its LP bound (Geoffrion 1974: the subproblems are integral)."""
    problem = large_problem(30, 8, n_resources, seed=n_resources, correlated=correlated)
    instance = Instance(problem.offset, problem.value, list(problem.cost__ro), problem.capacity)
    start = np.full(n_resources, problem.value.max())
    _, bounds, _ = minimise_dual(instance, start, start.copy(), 1e-11, 500)
    one_each = np.repeat(np.eye(30), 8, axis=1)
    lp = linprog(
        -problem.value, A_ub=problem.cost__ro, b_ub=problem.capacity, A_eq=one_each, b_eq=np.ones(30), method="highs"
    )
    # HiGHS' feasibility tolerance of 1e-7 on each scaled row leaves about 1e-7 of the value.
    assert bounds.min() == pytest.approx(-lp.fun, rel=1e-6)


@pytest.mark.parametrize("start", [0.0, 1e-3, 1e3, 1e9])
def test_dual_converges_from_far_away(start):
    problem = large_problem(72, 16, 4)
    instance = Instance(problem.offset, problem.value, list(problem.cost__ro), problem.capacity)
    wanted = minimise_dual(instance, np.full(4, 5000.0), np.full(4, 5000.0), 1e-11, 500)[1].min()
    found = minimise_dual(instance, np.full(4, start), np.full(4, 100.0), 1e-11, 500)[1].min()
    assert found == pytest.approx(wanted, rel=1e-9)


def test_sums_are_correctly_rounded():
    rng = np.random.default_rng(0)
    for _ in range(300):
        amounts = rng.random(int(rng.integers(0, 60))) * 10.0 ** rng.integers(-12, 12, 1)
        amounts = np.concatenate((amounts, -amounts[: len(amounts) // 2])) if rng.random() < 0.5 else amounts
        high, low = sum_use(amounts)
        assert high == math.fsum(amounts)
        exact = sum(map(Fraction, amounts), Fraction(0))
        size = sum((abs(Fraction(amount)) for amount in amounts), Fraction(1))
        assert abs(Fraction(high) + Fraction(low) - exact) <= size / 2**90


def test_local_search_never_exceeds_and_never_loses_value():
    for seed in range(20):
        problem = large_problem(20, 6, 3, seed=seed)
        core = Core(problem.offset, problem.value, problem.cost__ro.T, problem.capacity)
        choice = problem.offset[:-1].copy()
        use = np.zeros((3, 2))
        assert core.local_search(np.ones(3), choice, use, 200)
        totals = [math.fsum(row[choice]) for row in problem.cost__ro]
        assert np.array_equal(use[:, 0], totals)
        assert np.all(totals <= problem.capacity)
        assert problem.value[choice].sum() > 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 2], [1.0, 2.0], [np.ones(3)], [1.0]), "each cost row needs 2"),
        (([0, 2], [1.0, 2.0], [np.ones(2)], [1.0, 2.0]), "1 cost rows for 2 capacities"),
        (([0, 1, 1], [1.0], [np.ones(1)], [1.0]), "offset must rise"),
        (([0, 3], [1.0, 2.0], [np.ones(2)], [1.0]), "offset must rise"),
        (([0, 2], [1.0, 2.0], [np.ones(2)], [0.0]), "capacity must be above 0"),
        (([0, 1], [1.0], [np.ones(1)] * 65, [1.0] * 65), "at most 64"),
    ],
)
def test_instances_are_checked_at_the_door(arguments, message):
    with pytest.raises(ValueError, match=message):
        Instance(*arguments)


@pytest.mark.parametrize("threads", [1, 3])
def test_row_summaries(threads):
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 12, 3000)
    offset = np.concatenate(([0], np.cumsum(sizes)))
    row = rng.normal(size=offset[-1])
    summary = summarise_row(offset, row, threads)
    assert (summary.lowest, summary.highest, summary.finite) == (row.min(), row.max(), True)
    assert summary.sum_of_lowest == pytest.approx(np.minimum.reduceat(row, offset[:-1]).sum(), rel=1e-12)
    assert summary.sum_of_highest == pytest.approx(np.maximum.reduceat(row, offset[:-1]).sum(), rel=1e-12)
    for place in (0, 7, offset[-1] - 1):
        for damage in (np.nan, np.inf, -np.inf):
            damaged = row.copy()
            damaged[place] = damage
            assert not summarise_row(offset, damaged, threads).finite


def test_options_out_of_reach_are_no_favourites_nearby():
    problem = large_problem(200, 12, 3, seed=4)
    instance = Instance(problem.offset, problem.value, list(problem.cost__ro), problem.capacity)
    rng = np.random.default_rng(0)
    price = rng.random(3)
    reach = np.array([0.1, 0.0, 0.3])
    choice, best, _ = instance.score_groups(price)
    option, count = instance.select_reachable(price, reach, choice, best)
    assert len(option) < len(problem.value) / 2
    assert count.sum() == len(option)
    assert np.all(np.diff(option) > 0)
    assert np.array_equal(np.repeat(np.arange(200), count), np.searchsorted(problem.offset, option, side="right") - 1)
    for _ in range(50):
        near = price + reach * rng.uniform(-1.0, 1.0, 3)
        assert np.all(np.isin(instance.score_groups(np.maximum(near, 0.0))[0], option))


def test_dual_stays_within_the_allowed_distance():
    problem = large_problem(72, 16, 4)
    instance = Instance(problem.offset, problem.value, list(problem.cost__ro), problem.capacity)
    start = np.full(4, 1000.0)
    found, _, points = minimise_dual(instance, start, np.full(4, 100.0), 1e-11, 500, 1, np.full(4, 250.0))
    assert np.all(np.abs(points - start) <= 250.0)
    assert np.any(np.abs(found - start) == 250.0)  # the minimum is near 8000
