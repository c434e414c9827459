"""The score formula, the budgeted resources, and what is refused at the door."""

from __future__ import annotations

import numpy as np
import pytest
from instances import small_model

from layerlens.config import OptimizationConfig
from layerlens.exceptions import ActivationCacheError, OptimizationError
from layerlens.models import CostTable, UtilityTable
from layerlens.optimization import build_problem


def test_the_best_option_scores_one_and_only_budgeted_resources_constrain():
    spec, utilities, costs = small_model()
    problem = build_problem(spec, utilities, costs, OptimizationConfig(max_trainable_params=1000, max_vram_gb=2.0))
    assert problem.layers == ("layer.0", "layer.1", "layer.2")
    assert problem.options == utilities.options
    assert problem.value == pytest.approx(utilities.utility / utilities.utility.max(), rel=1e-15)
    assert problem.resources == ("trainable_params", "vram_gb")
    assert np.array_equal(problem.cost__ro, costs.cost__ro[[0, 2]])
    assert problem.budget.tolist() == [1000.0, 2.0]
    assert problem.base.tolist() == [0.0, 0.5]
    assert problem.capacity.tolist() == [1000.0, 1.5]
    assert problem.offset.tolist() == [0, 4, 8, 12]


def test_weights_and_penalties_follow_the_documented_formula():
    spec, utilities, costs = small_model()
    config = OptimizationConfig(
        max_trainable_params=1000,
        objective_weights={"utility": 2.0, "cost": 0.3, "latency": 0.5},
        method_penalties={"adapter": 0.25},
    )
    problem = build_problem(spec, utilities, costs, config)
    # Latency has no budget: it counts against the dearest choice of every layer together.
    dearest_latency = costs.cost__ro[3].reshape(3, 4).max(axis=1).sum()
    for index, option in enumerate(problem.options):
        wanted = 2.0 * utilities.utility[index] / utilities.utility.max()
        wanted -= 0.3 * costs.cost__ro[0, index] / 1000 + 0.5 * costs.cost__ro[3, index] / dearest_latency
        wanted -= 0.25 if option.method == "adapter" else 0.0
        assert problem.value[index] == pytest.approx(wanted, rel=1e-14, abs=1e-15)


def test_utilities_that_all_lose_keep_their_order_and_zero_utilities_stay_zero():
    spec, utilities, costs = small_model()
    config = OptimizationConfig(max_trainable_params=1000)
    loss = UtilityTable(utilities.options, -utilities.utility, "test", "")
    assert build_problem(spec, loss, costs, config).value == pytest.approx(-utilities.utility / utilities.utility.max())
    nothing = UtilityTable(utilities.options, np.zeros(12), "test", "")
    assert not build_problem(spec, nothing, costs, config).value.any()


@pytest.mark.parametrize("damage", [np.nan, np.inf, -np.inf])
def test_damaged_utilities_name_layer_method_and_rank(damage):
    spec, utilities, costs = small_model()
    utility = utilities.utility.copy()
    utility[6] = damage
    with pytest.raises(ActivationCacheError, match=r"utility of lora rank 4 on layer\.1 is .*profile the model again"):
        build_problem(
            spec, UtilityTable(utilities.options, utility, "t", ""), costs, OptimizationConfig(max_trainable_params=9)
        )


@pytest.mark.parametrize("damage", [np.nan, np.inf, -1.0])
def test_damaged_costs_name_resource_layer_method_and_rank(damage):
    spec, utilities, costs = small_model()
    cost__ro = costs.cost__ro.copy()
    cost__ro[1, 11] = damage
    cost__ro[1, 10] = damage
    with pytest.raises(OptimizationError, match=r"flops cost of lora rank 4 on layer\.2 is .* \(and 1 more\)"):
        build_problem(
            spec,
            utilities,
            CostTable(costs.options, cost__ro, costs.base, costs.source),
            OptimizationConfig(max_trainable_params=9),
        )


def test_tables_that_do_not_belong_together_are_refused():
    spec, utilities, costs = small_model()
    config = OptimizationConfig(max_trainable_params=9)
    swapped = (costs.options[1], costs.options[0], *costs.options[2:])
    with pytest.raises(OptimizationError, match="cost table are not"):
        build_problem(spec, utilities, CostTable(swapped, costs.cost__ro, costs.base), config)
    with pytest.raises(OptimizationError, match=r"layer 'layer\.2' has no options.*the end of the table"):
        build_problem(spec, UtilityTable(utilities.options[:8], utilities.utility[:8], "t", ""), costs, config)
    spec.layers.pop()
    with pytest.raises(OptimizationError, match=r"options for 'layer\.2'"):
        build_problem(spec, utilities, costs, config)
