"""Which options are trained as proxies: evenly over methods, roles, depths and ranks, and so is any beginning."""

from __future__ import annotations

from collections.abc import Sequence

from layerlens.models import METHODS, ModelSpec, Option
from layerlens.utils.order import evenly


def plan_proxies(spec: ModelSpec, options: Sequence[Option], count: int) -> tuple[Option, ...]:
    """``count`` of the options (all of them where there are fewer), the order in which they are to be trained.

    Methods take turns, in each method the roles do, and in each role depth and rank go through their ranges evenly, so
    that a study that is cut short is stratified as well.
    """
    streams = [_of_method(spec, options, method) for method in METHODS[1:]]
    return tuple(_take_turns([stream for stream in streams if stream])[:count])


def _of_method(spec: ModelSpec, options: Sequence[Option], method: str) -> list[Option]:
    ranks: dict[str, list[int]] = {}
    for option in options:
        if option.method == method:
            ranks.setdefault(option.layer, []).append(option.rank)
    by_role: dict[str, list[str]] = {}
    for layer in spec.layers:  # in forward order: position in the list is depth
        if layer.name in ranks:
            by_role.setdefault(layer.role, []).append(layer.name)
    return _take_turns([_of_role(method, layers, ranks, turn) for turn, layers in enumerate(by_role.values())])


def _of_role(method: str, layers: Sequence[str], ranks: dict[str, list[int]], shift: int) -> list[Option]:
    """Every (layer, rank) of one role once; ``shift`` lets roles begin at other depths and ranks."""
    order = evenly(len(layers))
    chosen = []
    for turn in range(max(len(sizes) for sizes in ranks.values())):
        for step in range(len(layers)):
            layer = layers[order[(step + shift) % len(layers)]]
            if turn < len(ranks[layer]):
                place = evenly(len(ranks[layer]))[(step + shift + turn) % len(ranks[layer])]
                chosen.append(Option(layer, method, ranks[layer][place]))
    return chosen


def _take_turns(streams: Sequence[Sequence[Option]]) -> list[Option]:
    longest = max((len(stream) for stream in streams), default=0)
    return [stream[turn] for turn in range(longest) for stream in streams if turn < len(stream)]
