"""Charges of a cost table as charges of an allocation problem: its rows, its options and its groups."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from layerlens.exceptions import OptimizationError
from layerlens.models import CostTable, DepthCharge, GroupCharge

Weighed = dict[int, tuple[float, float]]
"""Row of the table -> weight in the score, and what costs are measured against."""


def charges_of(
    costs: CostTable, kept: list[int], n_rows: int, weighed: Weighed, members: tuple[tuple[int, ...], ...]
) -> tuple[GroupCharge, ...]:
    """The table's group charges for the problem's options; ``inside`` stays as it is.

    Args:
        costs: the table.
        kept: its rows that the problem has, which are the problem's first.
        n_rows: how many rows the problem has.
        weighed: what takes a share off the score.
        members: the table's entries that each option of the problem stands for.
    """
    if not costs.charges:
        return ()
    owners: dict[int, list[int]] = {}
    for option, entries in enumerate(members):
        for entry in entries:
            owners.setdefault(entry, []).append(option)
    found = []
    for charge in costs.charges:
        own = sorted({option for entry in charge.options for option in owners.get(entry, ())})
        cost__r = np.asarray(charge.cost__r, dtype=np.float64)
        penalty = charge.penalty + sum(weight * (cost__r[row] / per) for row, (weight, per) in weighed.items())
        found.append(replace(charge, options=tuple(own), cost__r=_rows(cost__r, kept, n_rows), penalty=float(penalty)))
    return tuple(found)


def depth_of(
    costs: CostTable,
    kept: list[int],
    n_rows: int,
    weighed: Weighed,
    members: tuple[tuple[int, ...], ...],
    table_offset: np.ndarray,
    offset: np.ndarray,
) -> DepthCharge | None:
    """The table's depth charge for the problem's groups: a group of several layers reaches the lowest of their stages.

    Raises:
        OptimizationError: layers that choose alike have an option that is possible only below the lowest stage.
    """
    depth = costs.depth
    if depth is None:
        return None
    stage__e = np.repeat(np.asarray(depth.stage__g), np.diff(table_offset))
    cost__sr = np.asarray(depth.cost__sr, dtype=np.float64)
    penalty__s = np.zeros(len(cost__sr)) if depth.penalty__s is None else np.asarray(depth.penalty__s, dtype=np.float64)
    for row, (weight, per) in weighed.items():
        penalty__s = penalty__s + weight * (cost__sr[:, row] / per)
    below = None
    if depth.below__o is not None:
        if any(len(entries) > 1 and np.asarray(depth.below__o)[list(entries)].any() for entries in members):
            raise OptimizationError(
                "layers in choose_alike have an option that is possible only below the lowest adapted stage; leave "
                "them out of choose_alike"
            )
        below = np.array([bool(depth.below__o[entries[0]]) for entries in members])
    reaches = None
    if depth.reaches__o is not None:
        reaches = np.array([bool(np.asarray(depth.reaches__o)[list(entries)].any()) for entries in members])
    stages = []
    for first in offset[:-1]:
        own = stage__e[list(members[first])]
        stages.append(int(own[own >= 0].min(initial=len(cost__sr))) if np.any(own >= 0) else -1)
    return DepthCharge(
        stage__g=np.array(stages, dtype=np.int64),
        names=depth.names,
        cost__sr=np.array([_rows(row, kept, n_rows) for row in cost__sr]).reshape(-1, n_rows),
        reaches__o=reaches,
        below__o=below,
        penalty__s=penalty__s if penalty__s.any() else None,
    )


def _rows(cost__r: np.ndarray, kept: list[int], n_rows: int) -> np.ndarray:
    """Of a row of the table those that the problem has; resources of the user are not charged."""
    found = np.zeros(n_rows)
    found[: len(kept)] = cost__r[kept]
    return found
