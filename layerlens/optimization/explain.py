"""Why a layer got its option, and why the backward pass goes no deeper."""

from __future__ import annotations

import math

import numpy as np

from layerlens.models import Allocation, AllocationProblem, FrozenStage, LayerExplanation
from layerlens.optimization.charged import Charged
from layerlens.optimization.constraints import JOIN


def explain(problem: AllocationProblem, allocation: Allocation) -> list[LayerExplanation]:
    """One explanation for each layer, in the order of the problem.

    Where costs are paid once, an option's costs are what it adds to the choices of all other layers.
    """
    price = allocation.multipliers
    value, cost__ro, possible = _added(problem, allocation)
    score = value - price @ cost__ro
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
        used = allocation.used - cost__ro[:, chosen] + cost__ro[:, runner_up]
        explanations.append(
            LayerExplanation(
                layers=layers,
                chosen=problem.options[chosen],
                runner_up=problem.options[runner_up],
                value_to_flip=short,
                cost_to_flip={
                    name: short / float(p) for name, p in zip(problem.resources, price, strict=True) if p > 0.0
                },
                fits=bool(np.all(used <= problem.capacity) and possible[runner_up]),
            )
        )
    return explanations


def _added(problem: AllocationProblem, allocation: Allocation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each option adds to value and costs beside the other layers' choices, and whether it is possible there."""
    value, cost__ro = problem.value, problem.cost__ro
    possible = np.ones(len(problem.options), dtype=bool)
    if not problem.charged:
        return value, cost__ro, possible
    value, cost__ro = value.copy(), cost__ro.copy()
    group__o = np.repeat(np.arange(len(problem.layers)), np.diff(problem.offset))
    if problem.charges:
        causes = problem.causes
        count = np.zeros(len(problem.charges), dtype=np.int64)
        for option in allocation.choice:
            count[causes.of(int(option))] += 1
        # A pair counts where no other layer causes the charge: none does, or this layer's choice alone does.
        mine = np.zeros((len(causes.charge),), dtype=bool)
        chosen = {(group, int(c)) for group, o in enumerate(allocation.choice) for c in causes.of(int(o))}
        for pair, (option, charge) in enumerate(zip(causes.option.tolist(), causes.charge.tolist(), strict=True)):
            mine[pair] = count[charge] - ((group__o[option], charge) in chosen) == 0
        cost__cr = np.array([charge.cost__r for charge in problem.charges], dtype=np.float64)
        penalty = np.array([charge.penalty for charge in problem.charges])
        np.add.at(cost__ro.T, causes.option[mine], cost__cr[causes.charge[mine]])
        np.subtract.at(value, causes.option[mine], penalty[causes.charge[mine]])
    if problem.depth is not None:
        depth, stages = problem.depth, len(problem.depth.names)
        stage = np.asarray(depth.stage__g)
        reached = np.where(problem.reaches__o[allocation.choice], stage, stages)
        low = np.sort(reached)
        # The lowest stage of all other layers, for each layer.
        others = np.where(reached == low[0], low[1] if len(low) > 1 else stages, low[0])[group__o]
        here = np.where(problem.reaches__o, np.minimum(others, stage[group__o]), others)
        cost__sr = np.concatenate((np.asarray(depth.cost__sr, dtype=np.float64), np.zeros((1, len(cost__ro)))))
        cost__ro += (cost__sr[here] - cost__sr[others]).T
        if depth.penalty__s is not None:
            penalty = np.append(depth.penalty__s, 0.0)
            value -= penalty[here] - penalty[others]
        if depth.below__o is not None:
            forbidden = np.asarray(depth.below__o)[allocation.choice] & (stage >= 0)
            possible = ~(np.asarray(depth.below__o) & (stage[group__o] >= here) & (stage[group__o] >= 0))
            lowest_forbidden = int(stage[forbidden].max(initial=-1))
            possible &= here > lowest_forbidden
    return value, cost__ro, possible


def frozen_stages(problem: AllocationProblem, allocation: Allocation) -> list[FrozenStage]:
    """For each stage below the lowest one reached, the nearest first: what going down to it costs and would add."""
    depth = problem.depth
    if depth is None:
        return []
    stages = len(depth.names)
    reached = problem.lowest_stage(allocation.choice)
    lowest = stages if reached is None else reached
    charged = Charged(problem, threads=1)
    with np.errstate(over="ignore", under="ignore"):
        price = np.ldexp(
            allocation.multipliers[charged.reduced.rows],
            charged.reduced.value_exponent - charged.reduced.scale_exponents,
        )
    state = charged.at(price)
    cost__sr = np.concatenate((np.asarray(depth.cost__sr, dtype=np.float64), np.zeros((1, len(problem.resources)))))
    found = []
    for s in range(lowest - 1, -1, -1):
        modes = range(s * charged.structure.n_switches, (s + 1) * charged.structure.n_switches)
        mode = max(modes, key=lambda index: state.score[index])
        if not math.isfinite(state.score[mode]):
            continue
        choice = charged.choice(state, charged.items(state, mode))
        newly = (np.asarray(depth.stage__g) >= s) & (np.asarray(depth.stage__g) < lowest)
        gain = math.fsum(problem.value[choice[newly]]) - math.fsum(problem.value[allocation.choice[newly]])
        more = cost__sr[s] - cost__sr[lowest]
        found.append(
            FrozenStage(
                name=depth.names[s],
                cost={name: float(x) for name, x in zip(problem.resources, more, strict=True)},
                gain=gain,
                share=gain / abs(allocation.value) if allocation.value else math.inf,
            )
        )
    return found
