"""The choice as a grid of blocks and roles, for tables that people can scan; layers outside of blocks stay a list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerlens.manifest.layer_names import positions
from layerlens.models import NONE, ManifestRow

Cells = tuple[ManifestRow | None, ...]


@dataclass(frozen=True)
class Blocks:
    """Consecutive blocks of one stack that got the same.

    Args:
        stack: "bert.encoder.layer".
        first, last: their numbers.
        cells: what each role got, None where the block has no such layer.
    """

    stack: str
    first: int
    last: int
    cells: Cells

    @property
    def name(self) -> str:
        """ "3", or "3–7"."""
        return str(self.first) if self.first == self.last else f"{self.first}–{self.last}"


@dataclass(frozen=True)
class Grid:
    """A choice by blocks and roles.

    Args:
        roles: of all blocks, in order of appearance.
        blocks: in the model's order; their cells are in the order of ``roles``.
        outside: adapted layers that are in no block.
    """

    roles: tuple[str, ...]
    blocks: tuple[Blocks, ...]
    outside: tuple[ManifestRow, ...]

    @property
    def stacks(self) -> tuple[str, ...]:
        """The stacks of blocks: two where a model has an encoder and a decoder."""
        return tuple(dict.fromkeys(one.stack for one in self.blocks))


def grid_of(rows: Sequence[ManifestRow], *, joined: bool = True) -> Grid:
    """The grid of a manifest's rows.

    Args:
        rows: one for each layer.
        joined: whether consecutive blocks that got the same become one.
    """
    places = positions([row.layer for row in rows])
    within = [row for row in rows if places[row.layer].block is not None]
    roles = tuple(dict.fromkeys(places[row.layer].role for row in within))
    found: dict[tuple[str, int], dict[str, ManifestRow]] = {}
    for row in within:
        place = places[row.layer]
        found.setdefault((place.stack, place.block or 0), {})[place.role] = row
    blocks: list[Blocks] = []
    for (stack, block), by_role in found.items():
        cells = tuple(by_role.get(role) for role in roles)
        before = blocks[-1] if blocks else None
        if joined and before is not None and before.stack == stack and _options(before.cells) == _options(cells):
            blocks[-1] = Blocks(stack, before.first, block, cells)
        else:
            blocks.append(Blocks(stack, block, block, cells))
    outside = tuple(row for row in rows if places[row.layer].block is None and row.method != NONE)
    return Grid(roles, tuple(blocks), outside)


def _options(cells: Cells) -> list[tuple[str, int] | None]:
    return [None if row is None else (row.method, row.rank) for row in cells]
