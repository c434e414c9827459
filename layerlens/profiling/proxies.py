"""Proxies: which options are trained, evenly over methods, roles, depths and ranks; and their gains as bytes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from layerlens.models import ModelSpec, Option, ProxyGain, ProxyStudy
from layerlens.registry import METHODS
from layerlens.utils.order import evenly

FORMAT = "layerlens-proxies-1"


@dataclasses.dataclass(frozen=True)
class SavedProxies:
    """Where the gains of a study are kept, one after the other.

    Args:
        read: what was written last, None when there is nothing or it is damaged.
        write: keeps bytes in place of what was kept.
    """

    read: Callable[[], bytes | None]
    write: Callable[[bytes], None]

    def restore(self) -> dict[str, Any]:
        """The content that was kept last: ``study`` (see ``study_from_json``) and ``joint``; {} where there is none."""
        data = self.read()
        try:
            content = json.loads(data) if data else {}
        except (ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) and content.get("format") == FORMAT else {}

    def keep(self, **parts: Any) -> None:
        """Replace these parts of the content."""
        self.write(json.dumps({**self.restore(), "format": FORMAT, **parts}).encode())


def study_to_json(study: ProxyStudy | None) -> dict[str, Any] | None:
    """The study as JSON values."""
    return None if study is None else dataclasses.asdict(study)


def study_from_json(content: dict[str, Any] | None) -> ProxyStudy | None:
    """What ``study_to_json`` made.

    Raises:
        KeyError, TypeError: a field is missing or unknown.
    """
    if content is None:
        return None
    return ProxyStudy(**{**content, "gains": tuple(map(gain_from, content["gains"]))})


def gain_from(content: dict[str, Any]) -> ProxyGain:
    """One gain from its JSON values."""
    return ProxyGain(Option(**content["option"]), content["gain"], content["standard_error"])


def plan_proxies(spec: ModelSpec, options: Sequence[Option], count: int) -> tuple[Option, ...]:
    """``count`` of the options (all of them where there are fewer), the order in which they are to be trained.

    Methods take turns, in each method the roles do, and in each role depth and rank go through their ranges evenly, so
    that a study that is cut short is stratified as well.
    """
    streams = [_of_method(spec, options, method) for method in METHODS]
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
