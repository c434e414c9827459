"""Explanations: changing the runner-up by what they say makes it as good as the chosen option."""

from __future__ import annotations

import dataclasses

import numpy as np
from instances import large_problem, problem_of

from layerlens.optimization import explain, solve


def test_the_stated_value_flips_the_choice():
    problem = large_problem(60, 6, 1)
    allocation = solve(problem)
    price = allocation.multipliers[0]
    flipped = 0
    for group, told in enumerate(explain(problem, allocation)):
        assert told.layers == (problem.layers[group],)
        assert told.chosen == problem.options[allocation.choice[group]]
        runner_up = problem.options.index(told.runner_up)
        more = np.zeros(len(problem.value))
        more[runner_up] = told.value_to_flip
        scores = problem.value + more - price * problem.cost__ro[0]
        own = slice(problem.offset[group], problem.offset[group + 1])
        assert np.isclose(scores[runner_up], scores[allocation.choice[group]])
        if told.value_to_flip >= 0.0:
            assert scores[runner_up] >= np.delete(scores[own], [runner_up - own.start]).max() - 1e-9
        assert np.isclose(told.cost_to_flip["resource_0"] * price, told.value_to_flip)
        if told.value_to_flip > 0.0 and told.fits:
            more[runner_up] += problem.value[allocation.choice[group]]
            better = solve(dataclasses.replace(problem, value=problem.value + more))
            flipped += better.choice[group] == runner_up
    assert flipped > 0


def test_single_options_and_free_budgets():
    problem = problem_of([1, 2], [1.0, 0.0, 2.0], [[0.0, 0.0, 3.0]], [10.0])
    alone, free = explain(problem, solve(problem))
    assert alone.runner_up is None
    assert alone.value_to_flip is None
    assert free.value_to_flip == 2.0
    assert free.cost_to_flip == {}
    assert free.fits
