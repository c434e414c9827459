"""Beam search: its bound holds whatever its width, and a width that suffices for all states proves the optimum."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from instances import large_problem, problem_of, random_problem

from layerlens.exceptions import InfeasibleError
from layerlens.kernels._knapsack import Core
from layerlens.kernels.reference import exhaustive_optimum
from layerlens.optimization.beam import beam_search
from layerlens.optimization.core_search import Incumbent, search_core
from layerlens.optimization.feasibility import check_feasible
from layerlens.optimization.lagrangian import candidates_within, guided_search, solve_dual
from layerlens.optimization.reduced import reduce


def searched(problem, threshold, width, seed=0):
    reduced = reduce(problem)
    dual = solve_dual(reduced, 1)
    candidates = candidates_within(reduced.instance, dual, np.inf)
    return beam_search(reduced.instance, dual, candidates, threshold, width=width, seed=seed)


@pytest.mark.parametrize("width", [1, 3, 10, 4000])
@pytest.mark.parametrize("seed", [0, 7])
def test_value_and_bound_enclose_the_optimum(width, seed):
    proved = 0
    for instance_seed in range(300):
        problem = random_problem(20_000 + instance_seed, max_allocations=200)
        try:
            check_feasible(problem)
        except InfeasibleError:
            continue
        if not len(reduce(problem).rows):
            continue  # no budget binds, so there is nothing to search
        optimum, _ = exhaustive_optimum(problem.offset, problem.value, problem.cost__ro, problem.capacity)
        outcome = searched(problem, -1e6, width, seed)
        assert outcome.bound >= optimum
        if outcome.choice is not None:
            assert np.all([math.fsum(row[outcome.choice]) for row in problem.cost__ro] <= problem.capacity)
            assert math.fsum(problem.value[outcome.choice]) <= optimum
        # Tenths can exceed a budget by one unit in the last place, which the integers of the kernel do not resolve.
        if outcome.exhaustive and np.array_equal(problem.cost__ro, np.floor(problem.cost__ro)):
            proved += 1
            assert outcome.bound == pytest.approx(optimum, rel=1e-9, abs=1e-9)
            assert math.fsum(problem.value[outcome.choice]) == pytest.approx(optimum, rel=1e-12, abs=1e-12)
    assert proved > (100 if width == 4000 else 0)


def test_nothing_is_found_above_the_optimum():
    problem = large_problem(6, 4, 2)
    optimum, _ = exhaustive_optimum(problem.offset, problem.value, problem.cost__ro, problem.capacity)
    outcome = searched(problem, optimum, 10_000)
    assert outcome.choice is None
    assert outcome.exhaustive
    assert outcome.bound == pytest.approx(optimum, rel=1e-12)


@pytest.mark.parametrize("n_resources", [1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 31, 64])
def test_every_number_of_resources(n_resources):
    problem = large_problem(7, 3, n_resources, seed=n_resources)
    problem = dataclasses.replace(problem, capacity=3.0 * problem.capacity)
    assert len(reduce(problem).rows) == n_resources
    optimum, _ = exhaustive_optimum(problem.offset, problem.value, problem.cost__ro, problem.capacity)
    outcome = searched(problem, -1.0, 10_000)
    assert math.fsum(problem.value[outcome.choice]) == optimum


def test_equal_layers_are_not_searched_over_and_over():
    """40 equal layers with 3 options have 3**40 allocations but few distinct states."""
    problem = problem_of([3] * 40, [0.0, 3.0, 5.0] * 40, [[0, 1, 2] * 40, [0, 2, 3] * 40], [31.0, 52.0])
    reduced = reduce(problem)
    dual = solve_dual(reduced, 1)
    choice = guided_search(reduced.instance, dual)
    incumbent = Incumbent(choice, math.fsum(problem.value[choice]), dual.bound)
    search_core(reduced, dual, incumbent, 0.0, 0, False, threads=1)
    assert incumbent.bound == incumbent.value


def test_width_pays_and_every_bound_holds():
    problem = large_problem(40, 8, 4, correlated=True)
    outcomes = [searched(problem, 0.0, width) for width in (2, 20, 2000)]
    values = [math.fsum(problem.value[outcome.choice]) for outcome in outcomes]
    assert values[0] < values[-1]
    assert min(outcome.bound for outcome in outcomes) >= max(values)


def test_settings_are_checked():
    core = Core([0, 2], [0.0, 1.0], [[0.0], [1.0]], [1.0])
    choice = np.zeros(1, dtype=np.int64)
    for width, softness in ((0, 1.0), (1 << 23, 1.0), (10, 0.0)):
        with pytest.raises(ValueError, match="width must lie between"):
            core.beam_search(np.zeros(1), choice, 0.0, choice, width, softness)
    with pytest.raises(ValueError, match="wrong length"):
        core.beam_search(np.zeros(2), choice, 0.0, choice, 10)
