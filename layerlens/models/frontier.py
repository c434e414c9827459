"""One point of a budget-to-value curve."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FrontierRow:
    """A budget and what it buys.

    Args:
        kind: "hull" (a point of the exact concave hull, other budgets left aside) or "certified" (an allocation of the
            solver, all budgets kept).
        budget: of the resource that varies, base included.
        score: value of the allocation.
        upper_bound: no allocation within the budgets has a larger value.
        gap, status: as in an ``Allocation``.
        layer, method, rank: for a hull point, the one choice that changes from the point before; else "", "", 0.
    """

    kind: str
    budget: float
    score: float
    upper_bound: float
    gap: float
    status: str
    layer: str = ""
    method: str = ""
    rank: int = 0
