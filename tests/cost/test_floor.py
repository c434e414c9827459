"""Lower bounds of a step that add up: below the exact peak of every choice, and what is proved with them is true."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from random_steps import all_choices, random_case, sums__rk
from step_cases import MODELS, case, some_choices

from layerlens.config import OptimizationConfig
from layerlens.cost.floor import first_moments, floor_table
from layerlens.exceptions import InfeasibleError
from layerlens.jobs.find import find_allocation
from layerlens.jobs.frontier import envelope_of_all
from layerlens.models import NONE, CostTable, UtilityTable
from layerlens.models.step_use import AGAIN, BACKWARD, FORWARD, OWN
from layerlens.optimization import uniform_reference
from layerlens.optimization.cheapest import cost_share
from layerlens.registry import UTILITY_MODELS

ROUNDING = 1e-12
"""Some hundred terms, each rounded by 2^-53 of their sum."""


def moments_of(table: CostTable, choices: list[np.ndarray], rng: np.random.Generator) -> list[tuple[str, int]]:
    """Those that are taken first, peaks of some choices, and one of each kind that is no peak."""
    use = table.step
    some = [use.timeline(choices[number]).moment for number in rng.integers(0, len(choices), 3)]
    others = [(kind, int(rng.integers(0, len(use.alive)))) for kind in (FORWARD, BACKWARD, OWN)]
    if use.checkpoints is not None:
        spans = use.checkpoints.span__gt
        others.append((AGAIN, int(rng.integers(spans[0, 0], spans[-1, 1]))))
    return list(dict.fromkeys([*first_moments(use), *some, *others]))


def test_no_sum_is_above_what_a_choice_needs():
    for seed in range(20):
        spec, _, table = random_case(seed)
        rng, use, names = np.random.default_rng([1, seed]), table.step, [layer.name for layer in spec.layers]
        choices = all_choices(table)
        moments = moments_of(table, choices, rng)
        gb, ms = (np.array([figure(each) for each in choices]) for figure in (use.gb, use.ms))
        whole = floor_table(table, names, moments)
        lowest__a = np.array([min((use_of(table, each)), default=len(names)) for each in choices])
        for lowest in (None, *range(len(names))):
            of_it = np.ones(len(choices), dtype=bool) if lowest is None else lowest__a == lowest
            floor = whole if lowest is None else floor_table(table, names, moments, [names[lowest]], names[:lowest])
            own = [each for each, takes in zip(choices, of_it, strict=True) if takes]
            sums__ra = sums__rk(floor, own)
            alive__ma = sums__ra[5:] + np.array(floor.moments)[:, None]
            assert (alive__ma <= gb[of_it] * (1 + ROUNDING)).all()
            assert (sums__ra[4] + floor.base["step_ms"] <= ms[of_it] * (1 + ROUNDING)).all()
            assert (floor.cost__ro >= 0.0).all()


def test_no_sum_is_above_what_a_choice_with_known_layers_needs():
    """With the lowest layer known, and of one more whether it is adapted: the parts into which the proof divides."""
    for seed in range(12):
        spec, _, table = random_case(seed)
        rng, use, names = np.random.default_rng([2, seed]), table.step, [layer.name for layer in spec.layers]
        choices = all_choices(table)
        moments = moments_of(table, choices, rng)
        for lowest, other in itertools.combinations(range(len(names)), 2):
            for taken in (True, False):
                below = [*names[:lowest], *([] if taken else [names[other]])]
                chosen = [names[other]] if taken else []
                floor = floor_table(table, names, moments, [names[lowest]], below, chosen)
                own = [each for each in choices for layers in [use_of(table, each)]
                       if min(layers, default=len(names)) == lowest and (other in layers) == taken]  # fmt: skip
                sums__ra = sums__rk(floor, own)
                gb, ms = (np.array([figure(each) for each in own]) for figure in (use.gb, use.ms))
                assert (sums__ra[5:] + np.array(floor.moments)[:, None] <= gb * (1 + ROUNDING)).all()
                assert (sums__ra[4] + floor.base["step_ms"] <= ms * (1 + ROUNDING)).all()


def use_of(table: CostTable, entries: np.ndarray) -> list[int]:
    """The layers that a choice adapts."""
    return [int(table.options[entry].layer[-1]) for entry in entries if table.options[entry].method != NONE]


def test_what_is_proved_holds_for_every_choice_and_more_budget_never_lowers_it():
    """Exhaustively: no choice whose predicted step keeps the budgets scores above the bound."""
    proved = refused = 0
    for seed in range(30):
        spec, utilities, table = random_case(seed)
        rng, use, choices = np.random.default_rng([5, seed]), table.step, all_choices(table)
        gb, ms = (np.array([figure(each) for each in choices]) for figure in (use.gb, use.ms))
        params = np.array([table.cost__ro[0, each].sum() for each in choices])
        top = utilities.utility.max() if utilities.utility.max() > 0 else np.abs(utilities.utility).max() or 1.0
        score = np.array([utilities.utility[each].sum() / top for each in choices])
        limits = {"max_vram_gb": float(rng.choice(gb))}
        if seed % 2:
            limits["max_step_ms"] = float(rng.choice(ms))
        if seed % 3 == 0:
            limits["max_trainable_params"] = int(rng.integers(1, 60))
        bounds = []
        for factor in (1.0, 1.2):
            config = OptimizationConfig(
                **(limits | {"max_vram_gb": factor * limits["max_vram_gb"]}), methods=("lora", "adapter")
            )
            budgets = config.budgets()
            fits = gb <= budgets["vram_gb"]
            fits &= ms <= (budgets["step_ms"] or np.inf)
            fits &= params <= (budgets["trainable_params"] or np.inf)
            try:
                found = find_allocation(spec, utilities, table, config, seed=0, threads=1)
            except InfeasibleError:
                refused += 1
                continue
            allocation, entries = found.allocation, found.problem.entries(found.allocation.choice)
            assert use.gb(entries) <= budgets["vram_gb"] * (1 + ROUNDING)
            best = score[fits].max()
            assert best <= allocation.upper_bound + ROUNDING
            assert allocation.value <= allocation.upper_bound
            if allocation.status == "optimal":
                assert allocation.value >= best - 1e-6 * abs(best) - ROUNDING
                proved += 1
            bounds.append((best, allocation.value, allocation.upper_bound, allocation.status))
        for less, more in itertools.pairwise(bounds):
            if less[-1] == more[-1] == "optimal":
                assert more[1] >= less[1] - 1e-6 * abs(less[1])
            assert more[2] >= less[0] - ROUNDING
    assert proved > 30
    assert refused < 15


def test_no_choice_that_keeps_the_share_costs_less_than_what_is_proved_to_be_least():
    room = []
    for seed in range(18):
        spec, utilities, table = random_case(seed)
        adapts = np.array([option.method != NONE for option in utilities.options])
        utilities = replace(utilities, utility=np.abs(utilities.utility) + 0.1 * adapts, model="uniform")
        rng, choices = np.random.default_rng([9, seed]), all_choices(table)
        config = OptimizationConfig(
            objective="cheapest",
            quality_margin=float(rng.uniform(0.0, 0.6)),
            minimise=("step_ms", "vram_gb", {"step_ms": 1.0, "vram_gb": 1.0})[seed % 3],
            methods=("lora", "adapter"),
            max_trainable_params=int(rng.integers(20, 80)),
        )
        saving = find_allocation(spec, utilities, table, config, seed=0, threads=1).saving
        power = UTILITY_MODELS[utilities.model].set_power
        reference = uniform_reference(spec, utilities, table, config, power)
        shares = [
            cost_share(config, reference, table.total(each))
            for each in choices
            if reference.kept(each) >= saving.asked_share * (1 - ROUNDING)
            and table.cost__ro[0, each].sum() <= config.max_trainable_params
        ]
        assert saving.least_cost_share <= min(shares) + ROUNDING
        assert saving.least_cost_share <= saving.cost_share
        room.append(saving.cost_share - saving.least_cost_share)
    assert np.median(room) < 1e-6


def test_no_choice_lies_above_the_curve_of_memory_and_of_step_time():
    config = OptimizationConfig(max_trainable_params=5, methods=("lora", "adapter"))
    for seed in range(15):
        spec, utilities, table = random_case(seed)
        choices, top = all_choices(table), utilities.utility.max()
        if not top > 0.0:
            continue
        score = np.array([utilities.utility[each].sum() / top for each in choices])
        for resource, figure in (("vram_gb", table.step.gb), ("step_ms", table.step.ms)):
            rows = envelope_of_all(spec, utilities, table, config, resource)
            used = np.array([figure(each) for each in choices])
            budgets, scores = [row.budget for row in rows], [row.score for row in rows]
            assert used.min() >= budgets[0] * (1 - 1e-9)
            assert (score <= np.interp(used, budgets, scores) + ROUNDING).all()
            slope = np.diff(scores) / np.diff(budgets)
            assert np.all(slope[1:] <= slope[:-1] * (1 + 1e-6))


@pytest.mark.parametrize("name", MODELS)
def test_of_real_models_the_answer_is_proved_and_used_up_to_the_budget(name: str):
    """With the lowest layer known nearly every cause is, so little is left between the answer and its bound."""
    this = case(name)
    utility = np.array([0.0 if x.method == NONE else 1.0 + x.rank for x in this.table.options])
    utilities = UtilityTable(this.table.options, utility, "made up", "of nothing")
    names = [layer.name for layer in this.spec.layers]
    for entries in some_choices(this, 4, seed=2):
        chosen = np.array(entries)
        moment = this.table.step.timeline(chosen).moment
        floor = floor_table(this.table, names, [*first_moments(this.table.step), moment])
        alive = sums__rk(floor, [chosen])[5:, 0] + np.array(floor.moments)
        assert (alive <= this.table.step.gb(chosen) * (1 + ROUNDING)).all()
    everything = np.array([layer[-1] for layer in this.chain])
    amount = this.table.frozen["vram_gb"]
    config = OptimizationConfig(max_vram_gb=amount + 0.5 * (this.table.total(everything)["vram_gb"] - amount))
    found = find_allocation(this.spec, utilities, this.table, config, seed=0, threads=1)
    assert found.allocation.gap <= 0.02
