"""Where a layer stands in its model, read off its name: stack, block and role, for tables that people can scan."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

_BLOCK = re.compile(r"(?P<stack>.*?)(?:^|\.)(?P<block>\d+)(?:\.(?P<role>.+))?$")
_SAYS_NOTHING = ("dense", "self", "proj", "linear")


class Position(NamedTuple):
    """``bert.encoder.layer.3.attention.self.query``: stack ``bert.encoder.layer``, block 3, role ``query``.

    ``block`` is None for layers outside of the blocks; their role is their name.
    """

    stack: str
    block: int | None
    role: str


def positions(names: Sequence[str]) -> dict[str, Position]:
    """Position of every name; roles are as short as they can be while all of them differ."""
    found = {}
    for name in names:
        match = _BLOCK.match(name)
        if match is None:
            found[name] = Position("", None, name)
        else:
            found[name] = Position(match["stack"], int(match["block"]), match["role"] or "block")
    paths = list(dict.fromkeys(place.role for place in found.values() if place.block is not None))
    short = _short_roles(paths)
    return {
        name: place if place.block is None else place._replace(role=short[place.role]) for name, place in found.items()
    }


def _short_roles(paths: list[str]) -> dict[str, str]:
    """``attention.output.dense`` -> ``attention.output``: the shortest telling endings that are unique."""
    telling = {path: _without_empty_words(path) for path in paths}
    if len(set(telling.values())) < len(paths):
        telling = {path: path for path in paths}
    short = {}
    for path in paths:
        words = telling[path].split(".")
        for start in range(len(words) - 1, -1, -1):
            ending = ".".join(words[start:])
            if sum(_ends_with(other, ending) for other in telling.values()) == 1:
                break
        # The ending of a longer path (attention.output) may be a whole other path (output): both keep all their words.
        short[path] = ending
    return short


def _without_empty_words(path: str) -> str:
    words = path.split(".")
    while len(words) > 1 and words[-1] in _SAYS_NOTHING:
        words.pop()
    return ".".join(words)


def _ends_with(path: str, ending: str) -> bool:
    return path == ending or path.endswith(f".{ending}")
