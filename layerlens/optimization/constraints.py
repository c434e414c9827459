"""Constraints beyond the budgets, all brought into the form that the solver knows.

- Rules and ``max_rank`` take options away.
- Layers that must choose alike become one group, whose options are those that all of them have, with summed values and
  costs.
- "At least k layers with method m" is a budget of n − k on a resource that every other option of a layer uses once.
- A resource of the user is one more row of costs.
- ``serve_with`` takes ranks away, lets fused projections choose alike, and where the engine holds one rank for all
  layers the problem is solved once for each.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np

from layerlens.config import OptimizationConfig
from layerlens.config.optimization import LayerRule
from layerlens.engines import Engine
from layerlens.exceptions import ConfigurationError
from layerlens.integrations.transformers import role_of
from layerlens.methods import trainable_params
from layerlens.models import LayerSpec, ModelSpec, Option
from layerlens.models.model_spec import NONE
from layerlens.registry import ENGINES

COUNT_ROW = "layers_without_{}"
FUSED = {
    "query": "query_key_value", "key": "query_key_value", "value": "query_key_value",
    "ffn_gate": "ffn_gate_up", "ffn_up": "ffn_gate_up",
}  # fmt: skip
"""Roles that some models have in one layer -> the role of that layer."""
JOIN = " + "
"""Between the names of layers that choose alike, in the name of their group."""


def matching(spec: ModelSpec, pattern: str, field: str) -> list[str]:
    """Names of the layers that ``pattern`` (a pattern for names, or a role) means; none where all of them are left out.

    Raises:
        ConfigurationError: there is none; shows the nearest names and roles.
    """
    found = [layer.name for layer in spec.layers if layer.role == pattern or fnmatchcase(layer.name, pattern)]
    if not found and not any(role_of(name) == pattern or fnmatchcase(name, pattern) for name in spec.left_out):
        whole = next((layer for layer in spec.layers if layer.role and layer.role == FUSED.get(pattern)), None)
        if whole is not None:
            parts = [role for role, fused in FUSED.items() if fused == whole.role]
            raise ConfigurationError(
                f"{field}: {', '.join(parts[:-1])} and {parts[-1]} are one layer in this model ({whole.name}) and "
                f"always get the same option; call it {whole.role!r}"
            )
        known = [*dict.fromkeys(layer.role for layer in spec.layers if layer.role), *(x.name for x in spec.layers)]
        near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4) or known[:3]
        raise ConfigurationError(f"{field}: no layer is called {pattern!r}; nearest: {', '.join(near)}")
    return found


def without_idle_layers(spec: ModelSpec, rules: Sequence[LayerRule]) -> ModelSpec:
    """The layers without those that a rule leaves alone, which need not be measured; all where it leaves all alone.

    Raises:
        ConfigurationError: such a rule names no layer.
    """
    idle: dict[str, str] = {}
    for number, rule in enumerate(rules):
        if rule.max_rank == 0 or rule.methods == ():
            field = f"optimization.constraints.rules[{number}]"
            idle |= dict.fromkeys(matching(spec, rule.layers, f"{field}.layers"), f"{field} leaves it alone")
    left = [layer for layer in spec.layers if layer.name not in idle]
    return replace(spec, layers=left, left_out=spec.left_out | idle) if idle and left else spec


def allowed_options(spec: ModelSpec, options: Sequence[Option], config: OptimizationConfig) -> np.ndarray:
    """bool [n_options]: which options ``max_rank`` and the rules leave.

    Raises:
        ConfigurationError: a rule names no layer, or leaves a layer without any option.
    """
    allowed = np.ones(len(options), dtype=bool)
    if config.serve_with:
        allows = ENGINES[config.serve_with].allows
        allowed &= np.array([option.method == NONE or allows(option.rank) for option in options])
    if config.constraints.max_rank is not None:
        allowed &= np.array([option.rank <= config.constraints.max_rank for option in options])
    for number, rule in enumerate(config.constraints.rules):
        field = f"optimization.constraints.rules[{number}]"
        named = set(matching(spec, rule.layers, f"{field}.layers"))
        if rule.require and not named:
            name, why = next(one for one in spec.left_out.items() if fnmatchcase(one[0], rule.layers))
            raise ConfigurationError(f"{field}: requires {name}, which is left out: {why}")
        concerned = np.array([option.layer in named for option in options])
        allowed &= ~concerned | np.array([_fits(option, rule) for option in options])
        left = {option.layer for option, is_left in zip(options, allowed, strict=True) if is_left}
        if named - left:
            raise ConfigurationError(
                f"{field}: leaves no option for {min(named - left)}; offer more methods or ranks, or drop `require`"
            )
    return allowed


def _fits(option: Option, rule: LayerRule) -> bool:
    if option.method == NONE:
        return not rule.require
    return (
        (rule.methods is None or option.method in rule.methods)
        and option.method not in rule.forbid
        and (rule.ranks is None or option.rank in rule.ranks)
        and (rule.max_rank is None or option.rank <= rule.max_rank)
    )


def layers_alike(spec: ModelSpec, config: OptimizationConfig) -> list[list[str]]:
    """The layers in groups that choose together, in the order of the model; most groups have one layer.

    Raises:
        ConfigurationError: an entry of ``choose_alike`` names no layer.
    """
    leader = {layer.name: layer.name for layer in spec.layers}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    block = {layer.name: layer.block for layer in spec.layers}
    for number, entry in enumerate(config.constraints.choose_alike):
        field = f"optimization.constraints.choose_alike[{number}]"
        first_of_block: dict[int | None, str] = {}
        for name in (name for pattern in entry for name in matching(spec, pattern, field)):
            leader[find(name)] = find(first_of_block.setdefault(block[name], name))
    first: dict[str, str] = {}
    for layer in spec.layers if config.serve_with else ():
        for key in _served_together(ENGINES[config.serve_with or ""], layer):
            leader[find(layer.name)] = find(first.setdefault(key, layer.name))
    groups: dict[str, list[str]] = {}
    for layer in spec.layers:
        groups.setdefault(find(layer.name), []).append(layer.name)
    return list(groups.values())


def _served_together(engine: Engine, layer: LayerSpec) -> Iterator[str]:
    """Keys that a layer shares with those that ``engine`` wants with it: fused ones, and its like in all blocks."""
    parent, _, last = layer.name.rpartition(".")
    for group in engine.groups:
        if last in group:
            yield f"{parent}.{'+'.join(group)}"
    if engine.every_block and layer.block is not None:
        yield "*" + layer.name.replace(f".{layer.block}.", ".*.", 1)


def one_rank_each(config: OptimizationConfig) -> list[OptimizationConfig]:
    """The problems of which the best answer counts: one for each rank where the engine holds one rank, else one."""
    engine: Engine | None = ENGINES[config.serve_with] if config.serve_with else None
    if engine is None or engine.as_peft:
        return [config]
    found = []
    for rank in filter(engine.allows, config.lora_ranks):
        rule = LayerRule(layers="*", ranks=(rank,))
        constraints = config.constraints.model_copy(update={"rules": (*config.constraints.rules, rule)})
        found.append(config.model_copy(update={"constraints": constraints}))
    return found


def grouped_options(
    groups: list[list[str]], options: Sequence[Option], allowed: np.ndarray
) -> list[tuple[Option, tuple[int, ...]]]:
    """The options of every group, each with the indices in ``options`` that it stands for.

    Raises:
        ConfigurationError: layers that must choose alike have no option in common.
    """
    by_layer: dict[str, dict[tuple[str, int], int]] = {}
    for index, option in enumerate(options):
        if allowed[index]:
            by_layer.setdefault(option.layer, {})[option.method, option.rank] = index
    result = []
    for group in groups:
        shared = [choice for choice in by_layer[group[0]] if all(choice in by_layer[name] for name in group[1:])]
        if not shared:
            raise ConfigurationError(
                f"optimization.constraints.choose_alike: {' and '.join(group)} have no option in common; offer them "
                "the same methods and ranks"
            )
        for method, rank in shared:
            members = tuple(by_layer[name][method, rank] for name in group)
            result.append((Option(JOIN.join(group), method, rank), members))
    return result


def extra_rows(
    spec: ModelSpec, options: Sequence[Option], config: OptimizationConfig
) -> list[tuple[str, np.ndarray, float]]:
    """(name, float64 [n_options] cost, budget) of every user resource and of every least number of layers.

    Raises:
        ConfigurationError: more layers are wanted for a method than can take it.
    """
    layers = {layer.name: layer for layer in spec.layers}
    rows = []
    for name, resource in config.constraints.resources.items():
        cost = [
            resource.per_parameter * trainable_params(layers[option.layer], option.method, option.rank)
            + resource.per_rank * option.rank
            + resource.per_layer * (option.method != NONE)
            for option in options
        ]
        rows.append((name, np.array(cost, dtype=np.float64), resource.budget))
    for method, least in config.constraints.min_layers.items():
        able = sum(method in layer.methods for layer in spec.layers)
        if least > able or method not in config.methods:
            raise ConfigurationError(
                f"optimization.constraints.min_layers.{method}: wants {least} layers, but "
                + (f"{able} can take it" if method in config.methods else f"{method} is not in optimization.methods")
            )
        cost = [float(option.method != method) for option in options]
        rows.append((COUNT_ROW.format(method), np.array(cost), float(len(spec.layers) - least)))
    return rows
