"""The and-or graph of one part of a problem: layers that charges join, and what they can be together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from layerlens.exceptions import OptimizationError


class LocalItem(NamedTuple):
    """An item of a part: its group and its charges, numbered within the part; switches as they are; and depth.

    Args:
        group: which of the part's groups has it.
        causes: the charges that it causes.
        switches: the switches that must be on for it.
        reaches: possible only where the backward pass reaches the part's stage.
        below: possible only where it does not.
    """

    group: int
    causes: tuple[int, ...]
    switches: tuple[int, ...]
    reaches: bool
    below: bool


@dataclass(frozen=True)
class Template:
    """The graph of a part, with children numbered: items, charges, nodes, and the impossible item last.

    Args:
        n_nodes: how many nodes there are.
        rows_of_node: int64 [nodes], how many rows each has.
        children_of_row: int64 [rows], how many children each has.
        child: int64, the children, row after row.
        root: int64 [switch sets, 2], the part's root where its stage is reached, and where it is not.
    """

    n_nodes: int
    rows_of_node: np.ndarray
    children_of_row: np.ndarray
    child: np.ndarray
    root: np.ndarray


Row = tuple[int, ...]


@dataclass
class _Builder:
    items: tuple[LocalItem, ...]
    n_charges: int
    max_nodes: int
    nodes: list[tuple[Row, ...]] = field(default_factory=list)
    known: dict[tuple[Row, ...], int] = field(default_factory=dict)
    memo: dict[tuple, Row | None] = field(default_factory=dict)

    def node(self, rows: tuple[Row, ...]) -> int:
        """The number of a node with these rows, a new one if there is none."""
        if rows not in self.known:
            if len(self.nodes) >= self.max_nodes:
                raise OptimizationError(
                    f"the charges join layers in too many ways to be solved exactly (more than {self.max_nodes} nodes "
                    "for one part); join charges that the same layers cause, or add those of the least cost to their "
                    "options"
                )
            self.known[rows] = len(self.items) + self.n_charges + len(self.nodes)
            self.nodes.append(rows)
        return self.known[rows]

    def solve(self, alive: tuple[int, ...], open_: frozenset[int], closed: frozenset[int]) -> Row | None:
        """Children that together are the best of these items, one of each of their groups; None where a group has none.

        Args:
            alive: items that are possible; those that cause a closed charge no longer are.
            open_: charges that are paid for.
            closed: charges that are not.
        """
        wanted = {self.items[item].group for item in alive}
        alive = tuple(item for item in alive if not closed.intersection(self.items[item].causes))
        if {self.items[item].group for item in alive} != wanted:
            return None
        key = (alive, open_)
        if key not in self.memo:
            self.memo[key] = self._solve(alive, open_)
        return self.memo[key]

    def _solve(self, alive: tuple[int, ...], open_: frozenset[int]) -> Row | None:
        children: list[int] = []
        for part in self._components(alive, open_):
            groups: dict[int, set[int]] = {}
            for item in part:
                for charge in self.items[item].causes:
                    if charge not in open_:
                        groups.setdefault(charge, set()).add(self.items[item].group)
            if not groups:
                children.append(part[0] if len(part) == 1 else self.node(tuple((item,) for item in part)))
                continue
            # The charge that joins most comes first: what it contains falls apart in either row.
            charge = min(groups, key=lambda c: (-len(groups[c]), c))
            without = self.solve(part, open_, frozenset((charge,)))
            within = self.solve(part, open_ | {charge}, frozenset())
            rows = [] if without is None else [without]
            rows += [] if within is None else [(len(self.items) + charge, *within)]
            if not rows:
                return None
            children += rows[0] if len(rows) == 1 else (self.node(tuple(rows)),)
        return tuple(children)

    def _components(self, alive: tuple[int, ...], open_: frozenset[int]) -> list[tuple[int, ...]]:
        """The items, split into what no charge that is still undecided joins."""
        leader: dict[int, int] = {}

        def find(x: int) -> int:
            while leader.setdefault(x, x) != x:
                leader[x] = leader[leader[x]]
                x = leader[x]
            return x

        for item in alive:
            here = find(self.items[item].group)
            for charge in self.items[item].causes:
                if charge not in open_:
                    leader[find(-1 - charge)] = find(here)
        parts: dict[int, list[int]] = {}
        for item in alive:
            parts.setdefault(find(self.items[item].group), []).append(item)
        return [tuple(part) for part in parts.values()]


def build_template(items: tuple[LocalItem, ...], sets: list[frozenset[int]], staged: bool, max_nodes: int) -> Template:
    """The graph of a part for every set of switches, reached and not.

    Raises:
        OptimizationError: it has more nodes than ``max_nodes``.
    """
    n_charges = 1 + max((charge for item in items for charge in item.causes), default=-1)
    builder = _Builder(items, n_charges, max_nodes)
    roots: list[int | None] = []
    groups = {item.group for item in items}
    for on in sets:
        for is_below in (False, True):
            if is_below and not staged:
                roots.append(roots[-1])
                continue
            alive = tuple(
                index
                for index, item in enumerate(items)
                if on.issuperset(item.switches) and not (staged and (item.reaches if is_below else item.below))
            )
            children = None
            if {items[item].group for item in alive} == groups:
                children = builder.solve(alive, frozenset(), frozenset())
            if children is None:
                roots.append(None)
            else:
                roots.append(children[0] if len(children) == 1 else builder.node((children,)))
    n_nodes = len(builder.nodes)
    impossible = len(items) + n_charges + n_nodes
    rows = [row for node in builder.nodes for row in node]
    return Template(
        n_nodes=n_nodes,
        rows_of_node=np.array([len(node) for node in builder.nodes], dtype=np.int64),
        children_of_row=np.array([len(row) for row in rows], dtype=np.int64),
        child=np.array([child for row in rows for child in row], dtype=np.int64),
        root=np.array([impossible if root is None else root for root in roots], dtype=np.int64).reshape(-1, 2),
    )
