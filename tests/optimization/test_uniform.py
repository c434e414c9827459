"""Uniform LoRA as an allocation: equal ranks, within every budget, and nothing where none fits."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from layerlens.models import AllocationProblem, Option
from layerlens.optimization import solve, uniform_lora

RANKS = (1, 2, 4)


def make_problem(
    sizes: list[int], budget: float, *, adapters: bool = False, required: bool = False
) -> AllocationProblem:
    """A group for each size: none, LoRA at that many parameters a rank, and maybe an adapter that is worth most."""
    options, costs, values, offset = [], [], [], [0]
    for number, size in enumerate(sizes):
        name = f"layer {number}"
        if not (required and number == 0):
            options.append(Option(name, "none", 0))
            costs.append(0.0)
            values.append(0.0)
        for rank in RANKS:
            options.append(Option(name, "lora", rank))
            costs.append(float(rank * size))
            values.append(rank**0.5)
        if adapters:
            options.append(Option(name, "adapter", 2))
            costs.append(2.0 * size)
            values.append(9.0)
        offset.append(len(options))
    limit = np.array([float(budget)])
    return AllocationProblem(
        tuple(f"layer {n}" for n in range(len(sizes))), tuple(options), np.array(offset, dtype=np.int64),
        np.array(values), np.array([costs]), ("trainable_params",), limit, limit, np.zeros(1),
    )  # fmt: skip


def ranks_of(problem: AllocationProblem) -> list[int]:
    found = uniform_lora(problem, solve(problem))
    assert found is not None
    assert all(problem.options[index].method in ("none", "lora") for index in found.choice)
    return [problem.options[index].rank for index in found.choice]


def test_the_largest_equal_rank_and_the_rest_spread() -> None:
    assert ranks_of(make_problem([10, 10, 10, 10], 80)) == [2, 2, 2, 2]
    assert ranks_of(make_problem([10, 10, 10, 10], 120)) == [4, 2, 4, 2]  # two steps of 20 are left
    assert ranks_of(make_problem([10, 10, 10, 10], 20)) == [1, 0, 1, 0]
    assert ranks_of(make_problem([10, 30, 10, 10], 10_000)) == [4, 4, 4, 4]
    assert ranks_of(make_problem([10, 10], 20, adapters=True)) == [1, 1]


def test_no_uniform_lora_where_no_layer_fits() -> None:
    problem = make_problem([10, 10], 20, adapters=True)
    assert uniform_lora(problem, solve(problem)) is not None
    tiny = make_problem([10, 10], 10, required=True)
    assert ranks_of(tiny) == [1, 0]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(50, 800))
def test_it_fits_has_neighbouring_ranks_and_keeps_the_bound(sizes: list[int], budget: int) -> None:
    problem = make_problem(sizes, budget)
    optimum = solve(problem)
    found = uniform_lora(problem, optimum)
    assert found is not None  # the smallest budget pays for rank 1 on any single layer
    assert np.all(found.used <= problem.capacity)
    assert found.value <= found.upper_bound == optimum.upper_bound
    steps = {(0, *RANKS).index(problem.options[index].rank) for index in found.choice}
    assert max(steps) - min(steps) <= 1
