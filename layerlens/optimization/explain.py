"""Why each layer got what it got: its runner-up, and what would have to change for the choice to flip."""

from __future__ import annotations

import numpy as np

from layerlens.models import Allocation, AllocationProblem, LayerExplanation
from layerlens.optimization.constraints import JOIN


def explain(problem: AllocationProblem, allocation: Allocation) -> list[LayerExplanation]:
    """One explanation for each layer, in the order of the problem."""
    price = allocation.multipliers
    score = problem.value - price @ problem.cost__ro
    explanations = []
    for group, name in enumerate(problem.layers):
        layers = tuple(name.split(JOIN))
        chosen = int(allocation.choice[group])
        others = [index for index in range(problem.offset[group], problem.offset[group + 1]) if index != chosen]
        if not others:
            explanations.append(LayerExplanation(layers, problem.options[chosen], None, None, {}, False))
            continue
        runner_up = max(others, key=lambda index: score[index])
        short = float(score[chosen] - score[runner_up])
        used = allocation.used - problem.cost__ro[:, chosen] + problem.cost__ro[:, runner_up]
        explanations.append(
            LayerExplanation(
                layers=layers,
                chosen=problem.options[chosen],
                runner_up=problem.options[runner_up],
                value_to_flip=short,
                cost_to_flip={
                    name: short / float(p) for name, p in zip(problem.resources, price, strict=True) if p > 0.0
                },
                fits=bool(np.all(used <= problem.capacity)),
            )
        )
    return explanations
