"""The cheapest choice that keeps a share of uniform LoRA's gain, against exhaustive search, and what is said of it."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from layerlens.config import OptimizationConfig
from layerlens.exceptions import ConfigurationError, InfeasibleError
from layerlens.models import CostTable, DepthCharge, GroupCharge, LayerSpec, ModelSpec, Option, UtilityTable
from layerlens.optimization import (
    as_uniform,
    cheapest_problem,
    explain,
    saving_of,
    solve,
    uniform_reference,
)
from layerlens.optimization.cheapest import LEAST_SAVING, SHORTFALL, cost_share
from layerlens.vocabulary import RESOURCES

RANKS = (1, 4)
NAMES = [f"block.{n}" for n in range(6)]
SPEC = ModelSpec("m", 1000, [LayerSpec(name, n, "linear", n_in=8, n_out=8, methods=("lora",)) for n, name in
                             enumerate(NAMES)])  # fmt: skip
OPTIONS = tuple(
    Option(name, method, rank) for name in NAMES for method, rank in (("none", 0), ("lora", 1), ("lora", 4))
)
SOURCE = dict.fromkeys(RESOURCES, "test")


def tables(seed: int) -> tuple[UtilityTable, CostTable]:
    """Energies of layers that span a decade or more; costs with a charge for pairs of layers, and depth."""
    rng = np.random.default_rng(seed)
    energy = np.exp(rng.normal(0.0, 1.5, len(NAMES)))
    rank = np.array([option.rank for option in OPTIONS], dtype=float)
    utility = np.repeat(energy, 3) * np.sqrt(rank)
    cost = np.zeros((5, len(OPTIONS)))
    cost[0] = 16 * rank
    cost[1] = 10 * rank
    for row in (2, 3, 4):
        cost[row] = np.repeat(rng.uniform(0.5, 2.0, len(NAMES)), 3) * (rank > 0) * (1.0 + 0.02 * rank)
    pairs = [tuple(3 * layer + k for layer in (2 * p, 2 * p + 1) for k in (1, 2)) for p in range(3)]
    charges = tuple(GroupCharge(f"pair {p}", own, rng.uniform(0.2, 1.5, 5) * (np.arange(5) > 1)) for p, own in
                    enumerate(pairs))  # fmt: skip
    steps = np.cumsum(rng.uniform(0.0, 1.5, (len(NAMES), 5)) * (np.arange(5) > 1), axis=0)[::-1]
    depth = DepthCharge(np.arange(len(NAMES)), tuple(NAMES), np.ascontiguousarray(steps))
    base = {"trainable_params": 0.0, "flops": 0.0, "vram_gb": 3.0, "latency_ms": 2.0, "step_ms": 4.0}
    return (
        UtilityTable(OPTIONS, utility, "energy", "energy"),
        CostTable(OPTIONS, cost, base, SOURCE, charges, depth),
    )


def config_of(**settings) -> OptimizationConfig:
    return OptimizationConfig(
        **{"max_trainable_params": 16 * 4 * 6, "lora_ranks": RANKS, "objective": "cheapest", **settings}
    )


def answer(utilities, costs, config, power):
    reference = uniform_reference(SPEC, utilities, costs, config, power)
    problem = cheapest_problem(SPEC, utilities, costs, config, reference)
    allocation = solve(problem, gap_tolerance=1e-9)
    return reference, problem, allocation, saving_of(allocation, problem, costs, config, reference)


def least_by_trying(costs, config, reference) -> float:
    least = math.inf
    for ranks in itertools.product(range(3), repeat=len(NAMES)):
        entries = np.array([3 * layer + k for layer, k in enumerate(ranks)])
        # a billionth: the sums of the two sides are rounded in another order
        if reference.kept(entries) < 1.0 - config.quality_margin - 1e-9:
            continue
        use = costs.total(entries)
        if all(budget is None or use[name] <= budget + 1e-9 for name, budget in config.budgets().items()):
            least = min(least, cost_share(config, reference, use))
    return least


@pytest.mark.parametrize("minimise", ["step_ms", "vram_gb", {"step_ms": 2.0, "vram_gb": 1.0}, "trainable_params"])
def test_the_least_cost_of_all_choices(minimise):
    saved = 0
    for seed in range(12):
        utilities, costs = tables(seed)
        margin, power = [(0.05, 0.5), (0.0, 0.5), (0.3, 1.0), (0.1, 1.0)][seed % 4]
        config = config_of(minimise=minimise, quality_margin=margin)
        reference, problem, allocation, saving = answer(utilities, costs, config, power)
        least = least_by_trying(costs, config, reference)
        assert saving.cost_share == pytest.approx(least, rel=1e-9)
        assert saving.least_cost_share <= least * (1.0 + 1e-9)
        assert saving.cost_share - saving.least_cost_share <= 1e-6
        assert saving.kept_share >= 1.0 - margin - 1e-9
        assert saving.saves == (least <= 1.0 - LEAST_SAVING)
        assert saving.saves != bool(saving.reason)
        saved += saving.saves
        assert explain(problem, allocation)
        assert saving.price == dict(zip(problem.resources, allocation.multipliers, strict=True))[SHORTFALL] >= 0.0
    assert saved >= 4


def test_a_wider_margin_never_costs_more_and_budgets_hold():
    utilities, costs = tables(3)
    last = math.inf
    for margin in (0.0, 0.02, 0.1, 0.3, 0.6):
        config = config_of(quality_margin=margin, max_vram_gb=18.0)
        _, problem, allocation, saving = answer(utilities, costs, config, 0.5)
        assert saving.cost_share <= last + 1e-9
        assert costs.total(problem.entries(allocation.choice))["vram_gb"] <= 18.0
        last = saving.cost_share


def test_rules_hold_and_layers_that_choose_alike_do():
    utilities, costs = tables(5)
    config = config_of(
        quality_margin=0.3,
        constraints={"rules": [{"layers": "block.0", "require": True}], "choose_alike": [["block.4"], ["block.5"]]},
    )
    reference, problem, allocation, _ = answer(utilities, costs, config, 0.5)
    assert problem.options[allocation.choice[0]].method == "lora"
    assert reference.kept(problem.entries(allocation.choice)) >= 0.7


def test_uniform_is_an_answer_with_the_same_bound():
    utilities, costs = tables(1)
    config = config_of(quality_margin=0.0)
    reference, _, allocation, _ = answer(utilities, costs, config, 0.5)
    problem, uniform = as_uniform(SPEC, utilities, costs, reference, allocation)
    assert [problem.options[index].rank for index in uniform.choice] == [4] * 6
    assert uniform.upper_bound == allocation.upper_bound >= allocation.value >= uniform.value
    assert np.all(uniform.used <= problem.capacity)


def test_more_rank_than_uniform_lora_has_counts_for_no_other_layer():
    utilities, costs = tables(2)
    config = config_of(max_trainable_params=16 * 6, quality_margin=0.2)
    reference = uniform_reference(SPEC, utilities, costs, config, 1.0)
    assert {OPTIONS[entry].rank for entry in reference.entries} == {1}
    one, four = (np.array([3 * layer + k for layer in range(3)] + [9, 12, 15]) for k in (1, 2))
    energy = utilities.utility[1::3]
    assert reference.kept(four) == reference.kept(one) == pytest.approx(energy[:3].sum() / energy.sum())


def test_nothing_to_save_where_every_layer_is_needed():
    utilities, costs = tables(0)
    even = dataclasses.replace(utilities, utility=np.sqrt([float(option.rank) for option in OPTIONS]))
    _, _, _, saving = answer(even, costs, config_of(quality_margin=0.0), 0.5)
    assert not saving.saves
    assert saving.cost_share == pytest.approx(1.0)
    assert "no choice is proved to need less than" in saving.reason


def test_what_cannot_be_compared_is_refused():
    utilities, costs = tables(0)
    config = config_of()
    nothing = dataclasses.replace(utilities, utility=np.zeros(len(OPTIONS)))
    with pytest.raises(ConfigurationError, match="that is 0"):
        uniform_reference(SPEC, nothing, costs, config, 0.5)
    unknown = dataclasses.replace(costs, source={name: "x" for name in SOURCE if name != "step_ms"})
    with pytest.raises(ConfigurationError, match=r"optimization\.minimise: the step time of this model is not"):
        uniform_reference(SPEC, utilities, unknown, config, 0.5)
    with pytest.raises(InfeasibleError, match="no uniform LoRA fits the budgets"):
        uniform_reference(SPEC, utilities, costs, config_of(max_trainable_params=3), 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "score", "quality_margin": 0.1}, "quality_margin belongs to another objective"),
        ({"objective": "score", "minimise": "vram_gb"}, "minimise belongs to another objective"),
        ({"objective_weights": {"utility": 1.0, "step": 1.0}}, "objective_weights weighs the score"),
        ({"methods": ["ia3"]}, "add lora"),
        ({"minimise": {"step_ms": 0.0}}, "weights must be finite and above 0"),
        ({"minimise": {}}, "name at least one resource"),
        ({"quality_margin": 1.0}, "less than 1"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        config_of(**settings)
