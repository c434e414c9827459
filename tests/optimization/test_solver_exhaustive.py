"""The solver against exhaustive search on small instances, and properties that hold whatever the instance."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import problem_of, random_problem

from layerlens.exceptions import InfeasibleError
from layerlens.kernels.reference import exhaustive_optimum
from layerlens.optimization import solve


def check(problem, allocation):
    """What every allocation must have: one option in each group, exact budgets, a bound that is not below the value."""
    choice = allocation.choice
    assert choice.dtype == np.int64
    assert np.all((problem.offset[:-1] <= choice) & (choice < problem.offset[1:]))
    assert np.array_equal(allocation.used, [math.fsum(row[choice]) for row in problem.cost__ro])
    assert np.all(allocation.used <= problem.capacity)
    assert allocation.value == math.fsum(problem.value[choice])
    assert allocation.upper_bound >= allocation.value
    assert np.all(allocation.multipliers >= 0.0)


def solve_or_none(problem, **arguments):
    try:
        return solve(problem, **arguments)
    except InfeasibleError:
        return None


@pytest.mark.parametrize("first_seed", range(0, 1500, 250))
def test_bound_and_budgets_hold_without_refinement(first_seed):
    gaps = []
    for seed in range(first_seed, first_seed + 250):
        problem = random_problem(seed, max_allocations=300)
        allocation = solve_or_none(problem, refine=False)
        optimum, _ = exhaustive_optimum(problem.offset, problem.value, problem.cost__ro, problem.capacity)
        if allocation is None:  # nothing but "none" fits
            assert optimum <= 0.0
            continue
        check(problem, allocation)
        assert allocation.value <= optimum <= allocation.upper_bound
        if allocation.status == "optimal":
            assert allocation.value >= optimum - 1e-6 * abs(optimum)
        gaps.append((optimum - allocation.value) / optimum if optimum > 0.0 else 0.0)
    assert np.mean(np.array(gaps) < 1e-9) > 0.8


def test_refinement_finds_and_proves_the_optimum():
    for seed in range(5000, 5200):
        problem = random_problem(seed, max_allocations=2000)
        allocation = solve_or_none(problem)
        optimum, _ = exhaustive_optimum(problem.offset, problem.value, problem.cost__ro, problem.capacity)
        if allocation is None:
            assert optimum <= 0.0
            continue
        check(problem, allocation)
        assert allocation.status == "optimal"
        assert optimum <= allocation.upper_bound
        assert allocation.value == pytest.approx(optimum, rel=2e-6)


def test_more_budget_never_lowers_a_proven_optimum():
    for seed in range(60):
        problem = random_problem(9000 + seed, max_allocations=500)
        last = -math.inf
        for factor in (1.0, 1.1, 1.7, 4.0):
            allocation = solve_or_none(
                dataclasses.replace(problem, capacity=problem.capacity * factor, budget=problem.budget * factor),
                gap_tolerance=0.0,
            )
            if allocation is None:
                continue
            if allocation.gap == 0.0:
                assert allocation.value >= last
            last = max(last, allocation.value)


magnitudes = st.sampled_from([1e-300, 1e-30, 1e-6, 1.0, 1e6, 1e30, 1e290])
small_numbers = st.sampled_from([0.0, 0.0, 1.0, 1.0, 2.0, 3.0, 0.1, 0.3, 7.25])


@st.composite
def awkward_problems(draw):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    n_resources = draw(st.integers(1, 3))
    n_options = sum(sizes)
    scale = draw(magnitudes)
    value = np.array(draw(st.lists(small_numbers, min_size=n_options, max_size=n_options))) * scale
    cost = np.array(
        [
            np.array(draw(st.lists(small_numbers, min_size=n_options, max_size=n_options))) * draw(magnitudes)
            for _ in range(n_resources)
        ]
    )
    offset = np.concatenate(([0], np.cumsum(sizes)))
    choice = [draw(st.integers(int(begin), int(end) - 1)) for begin, end in itertools.pairwise(offset)]
    if draw(st.booleans()):
        cost[:, offset[:-1]] = 0.0
        value[offset[:-1]] = 0.0
    # Exactly what one allocation uses, so that something fits, and sometimes one unit in the last place more or less.
    capacity = np.array([math.fsum(row[choice]) for row in cost])
    if draw(st.booleans()):
        capacity = np.nextafter(capacity, draw(st.sampled_from([0.0, np.inf])))
    return problem_of(sizes, value, cost, np.maximum(capacity, 0.0), with_none=draw(st.booleans()))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(awkward_problems())
def test_awkward_instances(problem):
    optimum = exhaustive_optimum(problem.offset, problem.value, problem.cost__ro, problem.capacity)
    allocation = solve_or_none(problem)
    if optimum is None:
        assert allocation is None
        return
    if allocation is None:  # something fits, but nothing that adapts a layer
        none_only = np.array([option.method == "none" for option in problem.options])
        value = np.where(none_only, -np.inf, problem.value)
        for option in np.flatnonzero(~none_only):
            group = int(np.searchsorted(problem.offset, option, side="right") - 1)
            forced = np.where(np.arange(len(value)) == option, 0.0, -np.inf)
            keep = np.where(
                (np.arange(len(value)) >= problem.offset[group]) & (np.arange(len(value)) < problem.offset[group + 1]),
                forced,
                0.0,
            )
            found = exhaustive_optimum(problem.offset, keep, problem.cost__ro, problem.capacity)
            assert found is None or found[0] == -math.inf
        return
    check(problem, allocation)
    assert allocation.value <= optimum[0] <= allocation.upper_bound
    if allocation.status == "optimal":
        assert allocation.value >= optimum[0] - 1e-6 * abs(allocation.upper_bound)
