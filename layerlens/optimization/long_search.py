"""The search that goes on for as long as the user gives it: neighbourhoods of all sizes, and beams in other orders.

It ends by the clock, so its answer depends on the machine and its load; the searches before it end by counted work.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import numpy as np

from layerlens.optimization.core_search import CoreSearch, Incumbent
from layerlens.optimization.lagrangian import Dual
from layerlens.optimization.reduced import Reduced

# Alternatives and beam width of the neighbourhoods, in turn; work of each turn, in multiplications.
NEIGHBOURHOODS = ((250, 100), (120, 300), (400, 100), (60, 1_000), (600, 300))
TURN_WORK = 200_000_000
# Width of the beam in another order that follows each round of neighbourhoods.
ORDER_WIDTH = 1_000


class Deadline:
    """Set from a moment of ``time.monotonic`` on."""

    def __init__(self, at: float) -> None:
        self.at = at

    def is_set(self) -> bool:
        return time.monotonic() >= self.at


def search_until(
    reduced: Reduced,
    dual: Dual,
    incumbent: Incumbent,
    tolerance: float,
    seed: int,
    deadline: Deadline,
    progress: Callable[[Incumbent], None] = lambda incumbent: None,
) -> None:
    """Improve ``incumbent`` until its gap is within ``tolerance`` or the deadline has passed.

    A core that is small enough for the beam to be exhaustive in one order and not in another is proved on the way.
    """
    if deadline.is_set():
        return
    search = CoreSearch(reduced, dual, incumbent, tolerance)
    random = np.random.RandomState(seed + 1)  # not the one that has been through
    for turn in itertools.count(2):
        for search.neighbourhood, search.width in NEIGHBOURHOODS:
            if deadline.is_set() or search.closed():
                return
            search.wander(random, search.work + TURN_WORK, deadline)
            progress(search.incumbent)
        search.whole(ORDER_WIDTH, seed=turn)
        progress(search.incumbent)
