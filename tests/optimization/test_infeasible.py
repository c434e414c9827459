"""Budgets that allow nothing: the message names them, and the budget it asks for is the smallest that would do."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from instances import problem_of, small_model

from layerlens.config import OptimizationConfig
from layerlens.exceptions import InfeasibleError
from layerlens.optimization import build_problem, solve


def refusal(**budgets) -> str:
    spec, utilities, costs = small_model()
    with pytest.raises(InfeasibleError) as caught:
        solve(build_problem(spec, utilities, costs, OptimizationConfig(**budgets)))
    assert caught.value.exit_code == 3
    assert caught.value.smallest
    return str(caught.value)


def allowed(**budgets) -> bool:
    spec, utilities, costs = small_model()
    return any(solve(build_problem(spec, utilities, costs, OptimizationConfig(**budgets))).used > 0.0)


def test_too_few_parameters():
    message = refusal(max_trainable_params=10)
    assert message == (
        "optimization.max_trainable_params: 10 is too small for any option; "
        "the smallest that works is 16 (lora rank 1 on layer.0)"
    )
    assert allowed(max_trainable_params=16)
    refusal(max_trainable_params=15)


def test_less_than_the_frozen_model_needs():
    message = refusal(max_trainable_params=1000, latency_target_ms=3.5)
    assert message == (
        "optimization.latency_target_ms: 3.5 is less than the frozen model alone needs (4); "
        "the smallest that works is 4.125 (lora rank 1 on layer.0)"
    )
    assert allowed(max_trainable_params=1000, latency_target_ms=4.125)


def test_either_budget_would_do():
    """Adapters save memory, LoRA saves parameters: neither fits, and raising either budget alone is enough."""
    problem = problem_of([3], [0.0, 1.0, 1.0], [[0, 5, 9], [0, 9, 5]], [6.0, 6.0])
    with pytest.raises(InfeasibleError, match=r"resource_0\S*: 6 .* is 9 .*; or \S*resource_1\S*: 6 .* is 9"):
        solve(problem)


def test_two_budgets_must_rise_together():
    message = refusal(max_trainable_params=10, max_flops=5e6, max_vram_gb=2.0)
    assert re.fullmatch(
        r"2 budgets are too small for any option, and raising one alone is not enough: raise "
        r"optimization\.max_trainable_params to at least 16 \(got 10\) and "
        r"optimization\.max_flops to at least 16000000 \(got 5000000\), which allows lora rank 1 on layer\.0",
        message,
    )
    assert allowed(max_trainable_params=16, max_flops=16e6, max_vram_gb=2.0)
    refusal(max_trainable_params=16, max_flops=15e6)


def test_budgets_named_in_messages_suffice_in_float_arithmetic():
    """budget - base must reach the cost although both are rounded: 0.1 + 0.2 - 0.1 < 0.2 in float64."""
    problem = problem_of([2], [0.0, 1.0], [[0.0, 0.2]], [0.1])
    problem = dataclasses.replace(problem, base=problem.base + 0.1, budget=problem.budget + 0.1)
    with pytest.raises(InfeasibleError) as caught:
        solve(problem)
    named = float(re.search(r"works is (\S+)", str(caught.value)).group(1))
    assert named - 0.1 >= 0.2
    budget = np.array([named])
    assert solve(dataclasses.replace(problem, budget=budget, capacity=budget - problem.base)).value == 1.0


def test_layers_that_cannot_be_left_alone():
    problem = problem_of([2, 2], [1.0, 2.0, 1.0, 2.0], [[3, 4, 3, 5]], [5.0], with_none=False)
    with pytest.raises(InfeasibleError, match=r"resource_0\S*: 5 is too small even with the cheapest option of every"):
        solve(problem)


def test_conflicts_that_only_a_search_can_prove():
    """Each layer costs 4 of one resource or of the other; 7 and 7 hold one layer each, and there are three."""
    problem = problem_of([2, 2, 2], [1.0] * 6, [[0, 4] * 3, [4, 0] * 3], [7.0, 7.0], with_none=False)
    with pytest.raises(
        InfeasibleError,
        match=r"conflict: .*resource_0.budget to 8 \(got 7\), or raise .*resource_1.budget to 8 \(got 7\)",
    ):
        solve(problem)


@pytest.mark.parametrize(("given", "shown"), [(0.01, "0.01"), (0.1234567, "0.1234567"), (1e-7, "1e-07"), (2.0, "2")])
def test_the_given_budget_is_shown_as_given(given, shown):
    message = refusal(max_trainable_params=1000, latency_target_ms=given)
    assert f": {shown} is less than the frozen model alone needs (4)" in message


@pytest.mark.parametrize(("need", "shown"), [(0.01, "0.01"), (0.1234561, "0.123457"), (1.0000001, "1.00001")])
def test_the_smallest_budget_that_would_do_is_rounded_up_only_where_it_must(need, shown):
    with pytest.raises(InfeasibleError) as caught:
        solve(problem_of([2], [0.0, 1.0], [[0.0, need]], [need / 2]))
    assert re.search(r"works is (\S+)", str(caught.value)).group(1) == shown
    assert solve(problem_of([2], [0.0, 1.0], [[0.0, need]], [float(shown)])).value == 1.0
