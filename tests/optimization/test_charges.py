"""Charges that are paid once: the solver against exhaustive search, HiGHS, and one solve for each lowest stage."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from charged_instances import exhaustive_at_once, random_charged
from instances import problem_of
from scipy.optimize import Bounds, LinearConstraint, milp

from layerlens.exceptions import InfeasibleError, OptimizationError
from layerlens.models import AllocationProblem, DepthCharge, GroupCharge
from layerlens.optimization import explain, frontier, frozen_stages, solve
from layerlens.optimization.charged import Charged


def check(problem, allocation):
    """What every allocation must have, whatever the search: exact budgets, exact value, a bound not below it."""
    choice = allocation.choice
    assert np.all((problem.offset[:-1] <= choice) & (choice < problem.offset[1:]))
    assert problem.allowed(choice)
    assert np.array_equal(allocation.used, [math.fsum(row) for row in problem.terms__rk(choice)])
    assert np.all(allocation.used <= problem.capacity)
    assert allocation.value == math.fsum(problem.value_terms(choice))
    assert allocation.upper_bound >= allocation.value
    assert np.all(allocation.multipliers >= 0.0)


def adapts(problem, choice):
    return any(problem.options[option].method != "none" for option in choice)


@pytest.mark.parametrize("refine", [False, True])
def test_bound_budgets_and_optimum_hold_against_exhaustive_search(refine):
    found, closed = 0, 0
    for seed in range(120):
        problem = random_charged(seed + 120 * refine, max_allocations=250)
        best = exhaustive_at_once(problem)
        try:
            allocation = solve(problem, refine=refine)
        except InfeasibleError:
            assert best is None or not adapts(problem, best[1])
            continue
        assert best is not None
        check(problem, allocation)
        assert allocation.value <= best[0] <= allocation.upper_bound
        if allocation.status == "optimal":
            assert allocation.value >= best[0] - 1e-6 * abs(allocation.upper_bound)
        found += 1
        closed += allocation.status == "optimal"
    assert closed == found if refine else closed > 0.9 * found


def test_a_problem_without_a_value_to_choose_for_ends():
    """The limit of regrets is then a multiple of the smallest float64, which has no smaller share to begin with."""
    problem = random_charged(7_000_010, max_allocations=25)
    allocation = solve(problem)
    assert (allocation.value, allocation.status) == (exhaustive_at_once(problem)[0], "optimal")


def fixed_stage(problem: AllocationProblem, s: int) -> AllocationProblem | None:
    """The problem with the backward pass down to stage s at most, what that costs taken off the budgets.

    The plain way: options that reach below s are gone, and so are those that need the pass to end above their stage.
    """
    depth = problem.depth
    group = np.repeat(np.arange(len(problem.layers)), np.diff(problem.offset))
    stage = np.asarray(depth.stage__g)[group]
    below = np.zeros(len(group), dtype=bool) if depth.below__o is None else depth.below__o
    keep = ~(problem.reaches__o & (stage < s)) & ~(below & (stage >= s))
    sizes = np.bincount(group[keep], minlength=len(problem.layers))
    if np.any(sizes == 0):
        return None
    new = np.cumsum(keep) - 1
    cost = np.asarray(depth.cost__sr)[s] if s < len(depth.names) else np.zeros(len(problem.resources))
    penalty = 0.0 if depth.penalty__s is None or s == len(depth.names) else float(depth.penalty__s[s])
    value = problem.value[keep].copy()
    first = np.concatenate(([0], np.cumsum(sizes)))
    value[: first[1]] -= penalty
    return dataclasses.replace(
        problem,
        options=tuple(option for option, kept in zip(problem.options, keep, strict=True) if kept),
        offset=first,
        value=value,
        cost__ro=np.ascontiguousarray(problem.cost__ro[:, keep]),
        capacity=problem.capacity - cost,
        charges=tuple(
            dataclasses.replace(c, options=tuple(int(new[o]) for o in c.options if keep[o])) for c in problem.charges
        ),
        depth=None,
    )


def test_a_problem_that_nothing_fits_is_refused_at_any_price():
    """Prices of resources rise without end where nothing fits, so bounds near the largest float64 are met."""
    problem = random_charged(1_072_818, max_allocations=150)  # benchmarks/solver_fuzz.py found it
    assert exhaustive_at_once(problem) is None
    with pytest.raises(InfeasibleError):
        solve(problem, refine=False)


def test_one_solve_for_each_lowest_stage_is_the_same_optimum():
    compared = 0
    for seed in itertools.count(7000):
        problem = random_charged(seed, max_allocations=400)
        if problem.depth is None or not float(problem.cost__ro.sum()).is_integer():
            continue
        try:
            allocation = solve(problem)
        except InfeasibleError:
            continue
        values = []
        for s in range(len(problem.depth.names) + 1):
            part = fixed_stage(problem, s)
            if part is None or np.any(part.capacity < 0.0):
                continue
            try:
                values.append(solve(part).value)
            except InfeasibleError:  # nothing but "none" fits
                values.append(0.0)
        check(problem, allocation)
        assert allocation.value == pytest.approx(max(values), abs=2e-6 * abs(allocation.upper_bound))
        compared += 1
        if compared == 25:
            return


def by_highs(problem: AllocationProblem) -> float | None:
    """The optimum by branch and cut, charges and stages as binary variables; None where nothing fits."""
    n, k = len(problem.options), len(problem.charges)
    depth = problem.depth
    n_stages = 0 if depth is None else len(depth.names)
    size = n + k + n_stages
    rows, low, high = [], [], []

    def add(entries: dict[int, float], lower: float, upper: float) -> None:
        row = np.zeros(size)
        for column, entry in entries.items():
            row[column] += entry
        rows.append(row)
        low.append(lower)
        high.append(upper)

    for begin, end in itertools.pairwise(problem.offset):
        add({int(o): 1.0 for o in range(begin, end)}, 1.0, 1.0)
    for option in range(n):
        for charge in problem.causes.of(option):
            add({option: 1.0, n + int(charge): -1.0}, -np.inf, 0.0)
    value = np.concatenate((problem.value, [-c.penalty for c in problem.charges], np.zeros(n_stages)))
    cost = np.concatenate(
        (problem.cost__ro, np.array([c.cost__r for c in problem.charges]).reshape(k, len(problem.resources)).T), axis=1
    )
    if depth is not None:
        stage = np.repeat(depth.stage__g, np.diff(problem.offset))
        for option in np.flatnonzero(problem.reaches__o):
            add({int(option): 1.0, n + k + int(stage[option]): -1.0}, -np.inf, 0.0)
        for option in np.flatnonzero(
            (stage >= 0) & (np.zeros(n, dtype=bool) if depth.below__o is None else depth.below__o)
        ):
            add({int(option): 1.0, n + k + int(stage[option]): 1.0}, -np.inf, 1.0)
        for s in range(n_stages - 1):
            add({n + k + s: 1.0, n + k + s + 1: -1.0}, -np.inf, 0.0)
        steps = depth.cost__sr - np.concatenate((depth.cost__sr[1:], np.zeros((1, len(problem.resources)))))
        cost = np.concatenate((cost, steps.T), axis=1)
        if depth.penalty__s is not None:
            value[n + k :] = -(depth.penalty__s - np.append(depth.penalty__s[1:], 0.0))
    constraints = [
        LinearConstraint(cost, ub=problem.capacity * (1.0 + 1e-9) + 1e-9),
        LinearConstraint(np.array(rows), low, high),
    ]
    answer = milp(
        -value, constraints=constraints, bounds=Bounds(0, 1), integrality=np.ones(size), options={"mip_rel_gap": 0.0}
    )
    return None if answer.x is None else -float(answer.fun)


def test_highs_finds_the_same_optimum():
    for seed in range(9000, 9060):
        problem = random_charged(seed, max_allocations=3000)
        try:
            allocation = solve(problem)
        except InfeasibleError:
            continue
        scale = np.maximum(problem.capacity, 1e-9)
        scaled = dataclasses.replace(  # HiGHS' tolerances are absolute
            problem,
            cost__ro=problem.cost__ro / scale[:, None],
            capacity=problem.capacity / scale,
            charges=tuple(dataclasses.replace(c, cost__r=c.cost__r / scale) for c in problem.charges),
            depth=None
            if problem.depth is None
            else dataclasses.replace(problem.depth, cost__sr=problem.depth.cost__sr / scale),
        )
        check(problem, allocation)
        assert allocation.status == "optimal"
        assert by_highs(scaled) == pytest.approx(allocation.value, abs=1e-5 * max(1.0, abs(allocation.value)))


def test_the_bound_of_each_mode_holds_at_any_price():
    """Prices are arbitrary here: a bound at them is loose, never wrong."""
    rng = np.random.default_rng(3)
    for seed in range(40):
        problem = random_charged(11_000 + seed, max_allocations=200)
        charged = Charged(problem, threads=1)
        price = rng.random(charged.instance.n_resources) * rng.choice([0.0, 0.1, 1.0], charged.instance.n_resources)
        price = price * charged.reduced.largest_value / charged.instance.capacity
        state = charged.at(price)
        bounds = [charged.bound(price, float(score)) for score in state.score]
        best = exhaustive_at_once(problem)
        if best is not None:
            assert max(bounds) >= math.ldexp(best[0], charged.reduced.value_exponent)
            mode = int(np.argmax(state.score))
            totals = charged.totals(state, mode)
            assert state.score[mode] == pytest.approx(totals[1] - float(price @ totals[2:]), abs=1e-9)


def block_problem() -> AllocationProblem:
    """Two blocks of three layers with none, rank 1 and rank 2; the inputs of two of each are shared."""
    cost = np.array([[0.0, 1.0, 2.0] * 6, [0.0] * 18])
    problem = problem_of([3] * 6, np.array([0.0, 2.0, 3.0] * 6), cost, [9.0, 10.0])
    charges = []
    for block in range(2):
        own = [9 * block + 3 * layer + k for layer in range(3) for k in (1, 2)]
        outer = len(charges)
        charges.append(GroupCharge(f"block {block}", (), np.array([0.0, 2.0])))
        charges.append(GroupCharge(f"input {block}", tuple(own[:4]), np.array([0.0, 3.0]), inside=outer))
        charges.append(GroupCharge(f"output {block}", tuple(own[4:]), np.array([0.0, 1.0]), inside=outer))
    depth = DepthCharge(np.repeat([0, 1], 3), ("block 0", "block 1"), np.array([[0.0, 6.0], [0.0, 2.0]]))
    return dataclasses.replace(problem, charges=tuple(charges), depth=depth)


def test_a_choice_pays_each_charge_once_and_the_lowest_stage():
    problem = block_problem()
    choice = np.array([0, 3, 6, 10, 14, 15])  # two layers of block 1 that share their input
    assert problem.paid(choice) == (3, 4)
    assert problem.lowest_stage(choice) == 1
    assert [math.fsum(row) for row in problem.terms__rk(choice)] == [3.0, 2.0 + 3.0 + 2.0]
    assert problem.lowest_stage(problem.offset[:-1]) is None
    assert problem.paid(problem.offset[:-1]) == ()
    allocation = solve(problem)
    # All of block 1 costs 2 + 3 + 1 + 2 = 8 of 10; adding anything of block 0 would cost 4 and 2 + 1 more.
    assert allocation.choice.tolist() == [0, 3, 6, 11, 14, 17]
    assert allocation.status == "optimal"


def test_the_answer_is_the_same_for_any_number_of_threads():
    for seed in range(12_000, 12_010):
        problem = random_charged(seed, max_allocations=2000)
        try:
            answers = [solve(problem, threads=threads) for threads in (1, 2)]
        except InfeasibleError:
            continue
        assert answers[0].choice.tobytes() == answers[1].choice.tobytes()
        assert answers[0].upper_bound == answers[1].upper_bound
        assert answers[0].multipliers.tobytes() == answers[1].multipliers.tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"charges": (GroupCharge("a", (0,), np.array([1.0])),)}, "expected 2 finite costs"),
        ({"charges": (GroupCharge("a", (99,), np.zeros(2)),)}, "between 0 and 17"),
        ({"charges": (GroupCharge("a", (1,), np.zeros(2), inside=0),)}, "lies inside 0"),
        ({"charges": (GroupCharge("a", (1,), np.zeros(2), penalty=-1.0),)}, "penalty"),
        ({"depth": DepthCharge(np.zeros(6, int), ("a",), np.array([[0.0, -1.0]]))}, "finite costs of at least 0"),
        ({"depth": DepthCharge(np.zeros(5, int), ("a",), np.zeros((1, 2)))}, "a stage from -1 to 0 for each"),
        (
            {"depth": DepthCharge(np.zeros(6, int), ("a", "b"), np.array([[0.0, 1.0], [0.0, 2.0]]))},
            "stage b costs more than a",
        ),
    ],
)
def test_charges_that_mean_nothing_are_refused(change, message):
    with pytest.raises(OptimizationError, match=message):
        solve(dataclasses.replace(block_problem(), **change))


def test_the_frontier_is_the_hull_of_all_allocations():
    """Every allocation lies on or below it, and every point of it is one that costs and is worth what it says."""
    for seed in range(13_000, 13_030):
        problem = random_charged(seed, max_allocations=150)
        if not problem.charged or (problem.depth is not None and problem.depth.below__o is not None):
            continue
        curve = frontier(problem, problem.resources[0])
        everything = dataclasses.replace(problem, capacity=np.full(len(problem.resources), np.inf))
        assert np.all(np.diff(curve.budget) > 0.0)
        assert np.all(np.diff(curve.value) > 0.0)
        for point in range(len(curve.budget)):
            choice = curve.choice(point)
            assert math.fsum(problem.terms__rk(choice)[0]) == curve.budget[point]
            assert math.fsum(problem.value_terms(choice)) == curve.value[point]
        spread = float(np.ptp(problem.value)) + 1.0
        for each in itertools.product(*(range(a, b) for a, b in itertools.pairwise(problem.offset))):
            choice = np.array(each)
            cost, value = math.fsum(everything.terms__rk(choice)[0]), math.fsum(everything.value_terms(choice))
            assert curve.budget[0] <= cost
            assert value <= curve.upper_bound(cost) + 1e-6 * spread


def test_explanations_count_what_an_option_adds_to_the_others():
    problem = block_problem()
    allocation = solve(problem)
    explained = explain(problem, allocation)
    # A layer of block 0 alone would pay its input (3), its block (2) and four more for the depth: it does not fit.
    assert explained[0].chosen.method == "none"
    assert not explained[0].fits
    (stage,) = frozen_stages(problem, allocation)
    assert stage.name == "block 0"
    assert stage.cost == {"resource_0": 0.0, "resource_1": 4.0}
    assert stage.gain >= 0.0
    for seed in range(14_000, 14_020):
        problem = random_charged(seed, max_allocations=150)
        try:
            allocation = solve(problem)
        except InfeasibleError:
            continue
        for group, one in enumerate(explain(problem, allocation)):
            if one.runner_up is None:
                continue
            choice = allocation.choice.copy()
            own = range(problem.offset[group], problem.offset[group + 1])
            choice[group] = next(o for o in own if problem.options[o] == one.runner_up)
            used = np.array([math.fsum(row) for row in problem.terms__rk(choice)])
            near = np.any(np.abs(used - problem.capacity) <= 1e-12 * np.abs(problem.capacity))
            assert near or one.fits == (problem.allowed(choice) and bool(np.all(used <= problem.capacity)))
