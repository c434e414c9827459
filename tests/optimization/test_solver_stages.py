"""Determinism, refinement with and without OR-Tools, bounds against HiGHS, and what the solver reports."""

from __future__ import annotations

import builtins
import itertools
import math

import numpy as np
import pytest
from instances import large_problem, problem_of
from scipy.optimize import Bounds, LinearConstraint, milp

from layerlens.kernels import _dispatch
from layerlens.models import SolverEvent
from layerlens.optimization import core_search, solve


def same(a, b) -> bool:
    return (
        np.array_equal(a.choice, b.choice)
        and a.upper_bound == b.upper_bound
        and np.array_equal(a.multipliers, b.multipliers)
        and (a.value, a.status, a.solver) == (b.value, b.status, b.solver)
    )


@pytest.mark.parametrize("n_groups", [40, 4200])
def test_the_same_bits_for_every_thread_count_instruction_set_and_run(n_groups, monkeypatch):
    # Above 4096 groups the multipliers start from a sample of them. The wide searches would say nothing more here.
    monkeypatch.setattr(core_search, "WORK_LIMIT", 30_000_000)
    problem = large_problem(n_groups, 6, 3)
    wanted = solve(problem, refine=False)
    for isa in _dispatch.available_isas():
        _dispatch._force(isa)
        try:
            for threads in (1, 3):
                assert same(solve(problem, refine=False, threads=threads), wanted)
        finally:
            _dispatch._force(None)


@pytest.mark.parametrize(("n_groups", "n_resources", "is_closed"), [(24, 3, True), (60, 5, False)])
def test_searches_side_by_side_find_what_they_find_one_after_the_other(n_groups, n_resources, is_closed, monkeypatch):
    monkeypatch.setattr(core_search, "WORK_LIMIT", 100_000_000)
    monkeypatch.setattr(core_search, "NEIGHBOURHOOD_ALTERNATIVES", 50)  # so that both have something to do
    ran = []
    original = core_search._search_side_by_side

    def watched(search, *arguments):
        original(search, *arguments)
        ran.append(search.closed())

    monkeypatch.setattr(core_search, "_search_side_by_side", watched)
    problem = large_problem(n_groups, 16, n_resources, correlated=True)
    one, two = (solve(problem, refine=False, threads=threads) for threads in (1, 2))
    assert ran == [is_closed, is_closed]
    assert same(one, two)


def test_refinement_is_deterministic(monkeypatch):
    monkeypatch.setattr(core_search, "PROOF_WIDTHS", ())
    problem = large_problem(50, 16, 4, correlated=True)
    arguments = {"refine_deterministic_time": 0.3, "gap_tolerance": 0.0, "seed": 3}
    first = solve(problem, **arguments)
    assert first.solver == "greedy-lagrangian + beam-search + cp-sat"
    assert all(same(solve(problem, threads=threads, **arguments), first) for threads in (1, 2))


def test_refinement_never_makes_anything_worse(monkeypatch):
    monkeypatch.setattr(core_search, "PROOF_WIDTHS", ())
    for seed in range(3):
        problem = large_problem(40, 12, 4, seed=seed, correlated=bool(seed % 2))
        plain = solve(problem, refine=False)
        for limit in (1e-3, 0.2):
            refined = solve(problem, refine_deterministic_time=limit)
            assert refined.value >= plain.value
            assert refined.upper_bound <= plain.upper_bound
            assert refined.upper_bound >= refined.value


def test_without_ortools_the_lagrangian_answer_stays(monkeypatch):
    monkeypatch.setattr(core_search, "PROOF_WIDTHS", ())
    problem = large_problem(60, 16, 4, correlated=True)
    plain = solve(problem, refine=False)
    assert plain.status == "feasible"
    real_import = builtins.__import__

    def no_ortools(name, *arguments, **keywords):
        if name.startswith("ortools"):
            raise ImportError(name)
        return real_import(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", no_ortools)
    assert same(solve(problem), plain)


@pytest.mark.parametrize(("n_groups", "n_options", "n_resources"), [(30, 6, 1), (60, 8, 2), (40, 6, 4)])
def test_value_and_bound_enclose_what_highs_finds(n_groups, n_options, n_resources):
    problem = large_problem(n_groups, n_options, n_resources, seed=1)
    allocation = solve(problem)
    one_each = np.repeat(np.eye(n_groups), n_options, axis=1)
    highs = milp(
        -problem.value,
        constraints=[
            LinearConstraint(problem.cost__ro, ub=problem.capacity),
            LinearConstraint(one_each, lb=1, ub=1),
        ],
        bounds=Bounds(0, 1),
        integrality=np.ones(n_groups * n_options),
        options={"mip_rel_gap": 0.0},
    )
    assert highs.status == 0
    assert allocation.status == "optimal"
    assert allocation.value == pytest.approx(-highs.fun, rel=2e-6)


@pytest.mark.parametrize("correlated", [False, True])
def test_large_instances_have_small_gaps(correlated):
    allocation = solve(large_problem(1000, 16, 4, correlated=correlated), refine=False)
    assert allocation.gap < 2e-3


def test_budgets_that_do_not_bind_are_free():
    problem = problem_of([3, 3], [0, 1, 2, 0, 3, 1], [[0, 1, 2, 0, 1, 2]], [100.0])
    allocation = solve(problem)
    assert (allocation.value, allocation.gap, allocation.status) == (5.0, 0.0, "optimal")
    assert allocation.multipliers.tolist() == [0.0]
    assert allocation.solver == "greedy-lagrangian"


def test_a_budget_of_exactly_the_sum_is_used_to_the_last_unit():
    """Ten times 0.1 is 1.0 when rounded once, though 0.1 + 0.1 + ... is 0.9999999999999999."""
    problem = problem_of([2] * 10, [0.0, 1.0] * 10, [[0.0, 0.1] * 10], [1.0])
    allocation = solve(problem)
    assert (allocation.value, allocation.used[0], allocation.status) == (10.0, 1.0, "optimal")
    less = problem_of([2] * 10, [0.0, 1.0] * 10, [[0.0, 0.1] * 10], [math.nextafter(1.0, 0.0)])
    assert solve(less).value == 9.0


def test_equal_layers_use_the_whole_budget():
    """Every layer alike, as in the uniform utility: thousands of exact ties at the optimal price."""
    problem = problem_of([4] * 500, [0.0, 1.0, 1.4, 2.0] * 500, [[0.0, 1.0, 2.0, 4.0] * 500], [777.0])
    allocation = solve(problem)
    assert allocation.status == "optimal"
    assert allocation.used[0] == 777.0


def test_multipliers_price_the_budget():
    """One more unit of the budget is worth about its multiplier."""
    problem = large_problem(400, 8, 1)
    allocation = solve(problem, refine=False)
    more = problem_of([8] * 400, problem.value, problem.cost__ro, problem.capacity * 1.01)
    gain = solve(more, refine=False).upper_bound - allocation.upper_bound
    assert gain == pytest.approx(allocation.multipliers[0] * 0.01 * problem.capacity[0], rel=0.05)


def test_the_log_ends_with_the_answer_and_never_goes_back():
    events: list[SolverEvent] = []
    told: list[str] = []
    allocation = solve(large_problem(12, 6, 4, correlated=True), progress=told.append, log=events.append)
    assert [event.stage for event in events[:2]] == ["multipliers", "guided search"]
    assert events[0].value is None
    values = [event.value for event in events[1:]]
    assert values == sorted(values)
    assert all(later.upper_bound <= earlier.upper_bound for earlier, later in itertools.pairwise(events))
    assert all(later.seconds >= earlier.seconds for earlier, later in itertools.pairwise(events))
    assert (events[-1].value, events[-1].upper_bound) == (allocation.value, allocation.upper_bound)
    assert len(told) == len(events)
    assert told[-1].startswith(events[-1].stage)
