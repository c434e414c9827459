"""Why each layer got what it got: its runner-up, and what would have to change for the choice to flip."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from layerlens.models import Allocation, AllocationProblem, Option


@dataclass(frozen=True)
class LayerExplanation:
    """One layer's choice at the shadow prices of the budgets.

    The *score* of an option is its value minus what it uses of each budget at the budget's shadow price.

    Args:
        chosen: the option in the allocation.
        runner_up: the other option with the highest score; None if the layer has a single option.
        value_to_flip: how much more value the runner-up would need to score like the chosen one. Below 0 where the
            runner-up scores higher and the chosen one is there because it fits what the others leave.
        cost_to_flip: for each resource with a price, how much less the runner-up would have to use.
        fits: whether the runner-up would fit the budgets in place of the chosen option, all else equal.
    """

    layer: str
    chosen: Option
    runner_up: Option | None
    value_to_flip: float
    cost_to_flip: dict[str, float]
    fits: bool


def explain(problem: AllocationProblem, allocation: Allocation) -> list[LayerExplanation]:
    """One explanation for each layer, in the order of the problem."""
    price = allocation.multipliers
    score = problem.value - price @ problem.cost__ro
    explanations = []
    for group, layer in enumerate(problem.layers):
        chosen = int(allocation.choice[group])
        others = [index for index in range(problem.offset[group], problem.offset[group + 1]) if index != chosen]
        if not others:
            explanations.append(LayerExplanation(layer, problem.options[chosen], None, np.inf, {}, False))
            continue
        runner_up = max(others, key=lambda index: score[index])
        short = float(score[chosen] - score[runner_up])
        used = allocation.used - problem.cost__ro[:, chosen] + problem.cost__ro[:, runner_up]
        explanations.append(
            LayerExplanation(
                layer=layer,
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
