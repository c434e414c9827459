"""The frontier against the Lagrangian bound, exhaustive search and a brute-force hull; sweeps over one budget."""

from __future__ import annotations

import math

import numpy as np
import pytest
from instances import large_problem, problem_of, random_problem

from layerlens.exceptions import InfeasibleError, OptimizationError
from layerlens.kernels.reference import exhaustive_optimum
from layerlens.optimization import budget_sweep, frontier, solve
from layerlens.optimization.frontier import _stable_order


def test_every_point_is_an_allocation_and_the_best_for_what_it_uses():
    for seed in range(40):
        problem = random_problem(seed, max_allocations=300)
        curve = frontier(problem, "resource_0")
        assert np.all(np.diff(curve.budget) > 0.0)
        assert np.all(np.diff(curve.value) > 0.0)
        slopes = np.diff(curve.value) / np.diff(curve.budget)
        assert np.all(np.diff(slopes) <= 1e-9 * np.abs(slopes[1:]))
        for point in range(len(curve.budget)):
            choice = curve.choice(point)
            assert np.all((problem.offset[:-1] <= choice) & (choice < problem.offset[1:]))
            used = math.fsum(problem.cost__ro[0, choice])
            value = math.fsum(problem.value[choice])
            assert used == pytest.approx(curve.budget[point], rel=1e-12, abs=1e-12)
            assert value == pytest.approx(curve.value[point], rel=1e-12, abs=1e-12)
            optimum, _ = exhaustive_optimum(problem.offset, problem.value, problem.cost__ro[:1], np.array([used]))
            assert value == pytest.approx(optimum, rel=1e-12, abs=1e-12)


def test_lines_between_points_are_upper_bounds():
    problem = random_problem(3, max_allocations=300)
    curve = frontier(problem, "resource_0")
    for budget in np.linspace(curve.budget[0], curve.budget[-1], 25):
        optimum, _ = exhaustive_optimum(problem.offset, problem.value, problem.cost__ro[:1], np.array([budget]))
        assert curve.upper_bound(budget) >= optimum - 1e-12
    assert curve.upper_bound(1e9) == curve.value[-1]
    with pytest.raises(OptimizationError, match="allows nothing; the least is"):
        curve.upper_bound(curve.budget[0] - 1.0)


def test_equals_the_lagrangian_bound_of_one_resource():
    problem = large_problem(300, 12, 1, seed=5)
    curve = frontier(problem, "resource_0")
    bound = solve(problem, refine=False, gap_tolerance=1.0).upper_bound
    # The solver rounds its bound down to the next sum of integer values.
    assert bound <= curve.upper_bound(problem.capacity[0]) < bound + 1.0


def test_threads_change_nothing():
    problem = large_problem(500, 9, 2)
    one, three = (frontier(problem, "resource_1", threads=threads) for threads in (1, 3))
    assert np.array_equal(one.option, three.option)
    assert np.array_equal(one.value, three.value)


def test_ties_zero_costs_and_single_options():
    problem = problem_of([1, 3, 3], [5.0, 0, 1, 1, 0, 2, 2], [[2.0, 0, 0, 1, 0, 3, 3]], [9.0])
    curve = frontier(problem, "resource_0")
    assert curve.first.tolist() == [0, 2, 4]
    assert curve.budget.tolist() == [2.0, 5.0]
    assert curve.value.tolist() == [6.0, 8.0]
    assert curve.choice(1).tolist() == [0, 2, 5]


def test_unknown_resources_are_named():
    with pytest.raises(OptimizationError, match="no budget on 'flops'; it has budgets on resource_0, resource_1"):
        frontier(large_problem(3, 3, 2), "flops")


def test_sweep_keeps_the_other_budgets_and_never_loses_value():
    problem = large_problem(12, 5, 2)
    budgets = problem.budget[0] * np.array([0.5, 1.0, 2.0, 4.0])
    allocations = budget_sweep(problem, "resource_0", budgets)
    assert all(allocation.status == "optimal" for allocation in allocations)
    values = [allocation.value for allocation in allocations]
    assert values == sorted(values)
    assert values[1] == solve(problem).value
    for budget, allocation in zip(budgets, allocations, strict=True):
        assert allocation.used[0] <= budget
        assert allocation.used[1] <= problem.capacity[1]
    with pytest.raises(InfeasibleError):
        budget_sweep(problem, "resource_0", [0.5])


@pytest.mark.parametrize("distinct", [1, 2, 50, 10**9])
def test_ties_keep_their_order(distinct):
    key = np.random.default_rng(distinct).integers(0, distinct, 5000).astype(float)
    assert np.array_equal(_stable_order(key), np.argsort(key, kind="stable"))
    assert _stable_order(key[:0]).size == 0
