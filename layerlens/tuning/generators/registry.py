"""Which generators there are: the built-in one and those of installed packages.

A package offers one by an entry point in its ``pyproject.toml``::

    [project.entry-points."layerlens.generators"]
    mine = "my_package:MyGenerator"

It is called as ``MyGenerator(layers, tasks=1, seed=0)`` with a tuple of ``GeneratedLayer`` and returns a
``torch.nn.Module`` whose ``forward(task)`` gives {layer name: (A [rank, n_in], B [n_out, rank])}, B = 0 at
the start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from layerlens.config.wording import nearest_key
from layerlens.exceptions import ManifestError

GROUP = "layerlens.generators"
BUILT_IN = "hyperlora"


@dataclass(frozen=True)
class GeneratedLayer:
    """One LoRA layer to generate: A is [rank, n_in], B is [n_out, rank]."""

    name: str
    n_in: int
    n_out: int
    rank: int


def known_generators() -> tuple[str, ...]:
    """Names of all generators, the built-in one first."""
    return (BUILT_IN, *sorted({point.name for point in metadata.entry_points(group=GROUP)} - {BUILT_IN}))


def load_generator(name: str) -> Callable[..., Any]:
    """The generator of this name, to be called with layers.

    Raises:
        ManifestError: there is none of this name, or its package cannot be imported.
    """
    if name == BUILT_IN:
        from layerlens.tuning.generators.hyperlora import HyperLora

        return HyperLora
    points = [point for point in metadata.entry_points(group=GROUP) if point.name == name]
    if not points:
        known = known_generators()
        nearest = nearest_key(name, list(known))
        hint = f", did you mean {nearest!r}?" if nearest else ";"
        raise ManifestError(
            f"lora.generator: {name!r} is not known{hint} known: {', '.join(known)}. A package adds one by an entry "
            f"point in the group {GROUP}"
        )
    try:
        found: Callable[..., Any] = points[0].load()
    except (ImportError, AttributeError) as error:
        raise ManifestError(f"lora.generator: {name!r} ({points[0].value}) cannot be imported: {error}") from error
    return found
