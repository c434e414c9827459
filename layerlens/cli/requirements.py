"""What the installed LayerLens says that it needs, held against what is there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?:\[[^]]*\])?(?P<limits>[^;]*)(?:;(?P<marker>.*))?")
_EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")
_AT_LEAST = re.compile(r">=\s*([0-9][0-9.]*)")
DEVELOPERS = ("test", "dev")


@dataclass(frozen=True)
class Requirement:
    """One package that LayerLens, or one of its extras, needs.

    Args:
        name: name on PyPI.
        extra: extra that asks for it; "" for what every installation needs.
        wanted: lowest version that will do ("" for any).
        found: installed version; None where it is missing.
    """

    name: str
    extra: str
    wanted: str
    found: str | None

    @property
    def satisfied(self) -> bool:
        """It is installed, in a version that will do."""
        return self.found is not None and _numbers(self.found) >= _numbers(self.wanted)


def requirements() -> list[Requirement] | None:
    """Everything that the core and its extras need, developers' extras left out; None if not installed."""
    try:
        lines = metadata.requires("layerlens") or []
    except metadata.PackageNotFoundError:
        return None
    return parse_requirements(lines)


def parse_requirements(lines: Sequence[str]) -> list[Requirement]:
    """Requirements from the lines of a distribution's metadata, such as ``peft>=0.18; extra == "hf"``."""
    found = []
    for line in lines:
        match = _REQUIREMENT.match(line)
        extra = _EXTRA.search(line)
        if match is None or match["name"].lower() == "layerlens" or (extra and extra[1] in DEVELOPERS):
            continue
        limit = _AT_LEAST.search(match["limits"])
        wanted = limit[1] if limit else ""
        found.append(Requirement(match["name"], extra[1] if extra else "", wanted, _version(match["name"])))
    return found


def pip_line(missing: Sequence[Requirement]) -> str:
    """The command that installs what is missing."""
    extras = sorted({requirement.extra for requirement in missing if requirement.extra})
    return f"pip install 'layerlens[{','.join(extras)}]'" if extras else "pip install --upgrade layerlens"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` -> (2, 13, 0): enough to compare releases."""
    match = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
