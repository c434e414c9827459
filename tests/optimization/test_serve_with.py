"""optimization.serve_with: the choice is the best one that the engine holds, against exhaustive search."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from layerlens.config import OptimizationConfig
from layerlens.engines import FUSED, Engine
from layerlens.exceptions import ConfigurationError
from layerlens.jobs.find import find_allocation
from layerlens.methods import enumerate_options, trainable_params
from layerlens.models import RESOURCES, CostTable, LayerSpec, ModelSpec, Option, UtilityTable
from layerlens.registry import ENGINES

NAMES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
SPEC = ModelSpec(
    "m",
    1000,
    [
        LayerSpec(f"model.layers.{block}.{name}", 8, "linear", methods=("lora",), block=block)
        for block in range(2)
        for name in NAMES
    ],
)


def held(engine: Engine, picked: tuple[Option, ...]) -> bool:
    """The engine's rules said once more, for a whole allocation."""
    ranks = {option.layer: option.rank for option in picked if option.method == "lora"}
    if not all(engine.allows(rank) for rank in ranks.values()):
        return False
    if engine.as_peft:
        return True
    for layer in ranks:
        parent, _, last = layer.rpartition(".")
        for group in engine.groups:
            mates = [
                x.name for x in SPEC.layers if x.name.rpartition(".")[0] == parent and x.name.split(".")[-1] in group
            ]
            if last in group and not set(mates) <= set(ranks):
                return False
        if engine.every_block and not {layer.replace(".0.", ".1."), layer.replace(".1.", ".0.")} <= set(ranks):
            return False
    return len(set(ranks.values())) <= 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["vllm", "vllm-legacy", "sglang", "llama.cpp", "lorax", "any"])
def test_the_choice_is_the_best_that_the_engine_holds(name: str, seed: int) -> None:
    config = OptimizationConfig(max_trainable_params=700, lora_ranks=(1, 8, 16), serve_with=name)
    options = enumerate_options(SPEC, config.ranks())
    layers = {layer.name: layer for layer in SPEC.layers}
    rng = np.random.default_rng(seed)
    utility = np.array([option.rank**0.5 * rng.random() for option in options])
    cost__ro = np.zeros((len(RESOURCES), len(options)))
    cost__ro[0] = [trainable_params(layers[o.layer], o.method, o.rank) for o in options]
    base, source = dict.fromkeys(RESOURCES, 0.0), dict.fromkeys(RESOURCES, "exact")
    tables = UtilityTable(options, utility, "u", "1"), CostTable(options, cost__ro, base, source)
    solution = find_allocation(SPEC, *tables, config, seed=0, threads=1)
    picked = tuple(options[entry] for entry in solution.problem.entries(solution.allocation.choice))
    assert held(ENGINES[name], picked)
    by_layer = [[i for i, o in enumerate(options) if o.layer == layer.name] for layer in SPEC.layers]
    best = max(
        utility[list(each)].sum() / utility.max()
        for each in itertools.product(*by_layer)
        if cost__ro[0, list(each)].sum() <= 700 and held(ENGINES[name], tuple(options[i] for i in each))
    )
    assert solution.allocation.value == pytest.approx(best, rel=1e-6)
    assert solution.allocation.upper_bound >= best * (1 - 1e-9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"serve_with": "vlm"}, "did you mean 'vllm'"),
        ({"serve_with": "any", "methods": ("lora", "adapter")}, "holds LoRA alone, not adapter"),
        ({"serve_with": "lorax", "lora_ranks": (1, 2)}, "holds none of lora_ranks 1, 2"),
    ],
)
def test_what_cannot_be_served_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        OptimizationConfig(max_trainable_params=100, **fields)


def test_a_fused_group_is_named_by_its_last_parts() -> None:
    assert ENGINES["sglang"].groups == FUSED
    assert not ENGINES["llama.cpp"].groups
