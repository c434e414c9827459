"""Rules, layers that choose alike, least numbers of layers and resources of the user, against exhaustive search."""

from __future__ import annotations

import itertools
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerlens.config import OptimizationConfig
from layerlens.exceptions import ConfigurationError, InfeasibleError
from layerlens.methods import enumerate_options, trainable_params
from layerlens.models import RESOURCES, CostTable, LayerSpec, ModelSpec, Option, UtilityTable
from layerlens.optimization import build_problem, solve
from layerlens.optimization.constraints import layers_alike

SPEC = ModelSpec(
    "m",
    1000,
    [
        LayerSpec(f"block.{block}.{role}", 8, "linear", methods=("lora", "adapter"), block=block, role=role)
        for block in range(2)
        for role in ("query", "value", "ffn_down")
    ],
)
RANKS: dict[str, Any] = {"lora_ranks": (1, 2), "adapter_sizes": (2,), "methods": ("lora", "adapter")}


def chosen(seed: int = 0, budget: int = 150, **fields: Any) -> tuple[list[Option], float, OptimizationConfig]:
    """The options that the solver picks for random utilities, one for each layer in order."""
    config = OptimizationConfig(max_trainable_params=budget, constraints=fields, **RANKS)
    options = enumerate_options(SPEC, config.ranks())
    layers = {layer.name: layer for layer in SPEC.layers}
    rng = np.random.default_rng(seed)
    utility = np.array([option.rank * rng.random() for option in options])
    cost__ro = np.zeros((len(RESOURCES), len(options)))
    cost__ro[0] = [trainable_params(layers[o.layer], o.method, o.rank) for o in options]
    base = dict.fromkeys(RESOURCES, 0.0)
    problem = build_problem(SPEC, UtilityTable(options, utility, "u", "1"), CostTable(options, cost__ro, base), config)
    allocation = solve(problem)
    picked = [options[entry] for entry in problem.entries(allocation.choice)]
    assert [option.layer for option in picked] == [layer.name for layer in SPEC.layers]
    assert allocation.status == "optimal"
    best = -np.inf
    by_layer = [[i for i, o in enumerate(options) if o.layer == layer.name] for layer in SPEC.layers]
    for combination in itertools.product(*by_layer):
        together = [options[index] for index in combination]
        if cost__ro[0, list(combination)].sum() <= budget and admissible(together, config):
            best = max(best, utility[list(combination)].sum() / utility.max())
    assert allocation.value == pytest.approx(best, rel=1e-6, abs=1e-12)
    return picked, best, config


def admissible(picked: list[Option], config: OptimizationConfig) -> bool:
    """The constraints said once more, for whole allocations."""
    roles = {layer.name: layer.role for layer in SPEC.layers}
    blocks = {layer.name: layer.block for layer in SPEC.layers}
    for option in picked:
        if config.constraints.max_rank is not None and option.rank > config.constraints.max_rank:
            return False
        for rule in config.constraints.rules:
            if rule.layers != roles[option.layer] and not fnmatchcase(option.layer, rule.layers):
                continue
            if option.method == "none":
                if rule.require:
                    return False
                continue
            if rule.methods is not None and option.method not in rule.methods:
                return False
            if option.method in rule.forbid or (rule.ranks is not None and option.rank not in rule.ranks):
                return False
            if rule.max_rank is not None and option.rank > rule.max_rank:
                return False
    for entry in config.constraints.choose_alike:
        for block in (0, 1):
            choices = {(o.method, o.rank) for o in picked if roles[o.layer] in entry and blocks[o.layer] == block}
            if len(choices) > 1:
                return False
    for method, least in config.constraints.min_layers.items():
        if sum(option.method == method for option in picked) < least:
            return False
    for resource in config.constraints.resources.values():
        used = sum(resource.per_layer + resource.per_rank * o.rank for o in picked if o.method != "none")
        if used > resource.budget:
            return False
    return True


rules = st.lists(
    st.fixed_dictionaries(
        {"layers": st.sampled_from(["query", "value", "ffn_down"])},
        optional={
            "forbid": st.sampled_from([("lora",), ("adapter",)]),
            "ranks": st.sampled_from([(1,), (2,), (1, 2)]),
            "max_rank": st.integers(0, 2),
            "methods": st.sampled_from([("lora",), ("adapter",), ("lora", "adapter")]),
        },
    ).filter(lambda rule: len(rule) > 1),
    max_size=2,
)


@given(
    seed=st.integers(0, 1000),
    fields=st.fixed_dictionaries(
        {},
        optional={
            "rules": rules,
            "choose_alike": st.sampled_from([[["query", "value"]], [["query", "value", "ffn_down"]]]),
            "max_rank": st.integers(1, 2),
            "resources": st.sampled_from(
                [{"files": {"budget": 3, "per_layer": 1}}, {"x": {"budget": 5, "per_rank": 1}}]
            ),
        },
    ),
)
@settings(max_examples=25, deadline=None)
def test_the_answer_is_the_best_of_all_that_keep_the_constraints(seed, fields):
    try:
        picked, _, config = chosen(seed, **fields)
    except InfeasibleError:  # the rules left nothing that adapts anything
        return
    assert admissible(picked, config)


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_at_least_so_many_layers_take_a_method(method):
    picked, best, _ = chosen(3, min_layers={method: 4}, budget=200)
    assert sum(option.method == method for option in picked) >= 4
    assert best <= chosen(3, budget=200)[1]


def test_required_layers_are_adapted_and_forbidden_ones_are_not():
    picked, _, _ = chosen(
        1, rules=[{"layers": "block.0.*", "max_rank": 0}, {"layers": "block.1.value", "require": True, "ranks": [2]}]
    , budget=60)  # fmt: skip
    by_layer = {option.layer: option for option in picked}
    assert all(by_layer[f"block.0.{role}"].method == "none" for role in ("query", "value", "ffn_down"))
    assert by_layer["block.1.value"].rank == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rules": [{"layers": "valeu", "max_rank": 1}]},
            r"rules\[0\]\.layers: no layer is called 'valeu'; nearest: value",
        ),
        ({"rules": [{"layers": "query", "require": True, "ranks": [7]}]}, r"rules\[0\]: leaves no option for block\.0"),
        ({"choose_alike": [["nothing"]]}, r"choose_alike\[0\]: no layer is called 'nothing'"),
        (
            {
                "choose_alike": [["query", "value"]],
                "rules": [
                    {"layers": "query", "require": True, "forbid": ["lora"]},
                    {"layers": "value", "require": True, "forbid": ["adapter"]},
                ],
            },
            "have no option in common",
        ),
        ({"min_layers": {"lora": 7}}, r"min_layers\.lora: wants 7 layers, but 6 can take it"),
        ({"min_layers": {"prefix": 1}}, "prefix is not in optimization.methods"),
        ({"min_layers": {"lora": 0}}, "at least 1"),
        ({"rules": [{"layers": "query"}]}, "changes nothing"),
        ({"resources": {"flops": {"budget": 1, "per_rank": 1}}}, "already"),
        ({"resources": {"bytes": {"budget": 1}}}, "never used"),
    ],
)
def test_contradictions_are_refused_by_field(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        chosen(**fields)


def test_a_conflict_names_the_smallest_change_of_each_limit():
    with pytest.raises(InfeasibleError) as told:
        chosen(min_layers={"lora": 6}, budget=50)
    message = str(told.value)
    assert "optimization.max_trainable_params and optimization.constraints.min_layers.lora conflict" in message
    assert "raise optimization.max_trainable_params to 96 (got 50)" in message  # six layers of rank 1, 16 each
    assert "lower optimization.constraints.min_layers.lora to 3 (got 6)" in message
    assert chosen(min_layers={"lora": 6}, budget=96)
    assert chosen(min_layers={"lora": 3}, budget=50)


@pytest.mark.parametrize(("asked", "role"), [("query", "query_key_value"), ("ffn_up", "ffn_gate_up")])
def test_a_part_of_a_fused_layer_is_told_which_layer_has_it(asked: str, role: str):
    fused = [
        LayerSpec(f"block.0.{name}", 8, "linear", methods=("lora",), block=0, role=name) for name in (role, "other")
    ]
    config = OptimizationConfig(max_trainable_params=100, constraints={"choose_alike": [[asked, "other"]]})
    with pytest.raises(
        ConfigurationError, match=rf"are one layer in this model \(block\.0\.{role}\).*call it '{role}'"
    ):
        layers_alike(ModelSpec("m", 1000, fused), config)
