"""NumPy twin of the knapsack kernels (`_lagrangian`), which is their specification, and exhaustive search.

Same letters and words as `cpp/include/layerlens/knapsack.hpp`: g groups, o options, r resources.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

BLOCK_GROUPS = 64


def score_groups(
    offset: np.ndarray, value: np.ndarray, cost_rows: Sequence[np.ndarray], price: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Favourite of each group: choice int64 [g], score float64 [g], totals float64 [2 + r] (score, value, uses).

    The score is ((v − p0 c0) − p1 c1) − ..., the first of equal options wins, totals are summed in blocks of groups.
    """
    score = np.array(value, dtype=np.float64)
    for p, row in zip(price, cost_rows, strict=True):
        score = score - p * row
    choice = np.array([begin + int(np.argmax(score[begin:end])) for begin, end in itertools.pairwise(offset)])
    columns = [score[choice], value[choice], *(row[choice] for row in cost_rows)]
    totals = []
    for column in columns:
        total = 0.0
        for begin in range(0, len(column), BLOCK_GROUPS):
            block = 0.0
            for amount in column[begin : begin + BLOCK_GROUPS]:
                block += float(amount)
            total += block
        totals.append(total)
    return choice, score[choice], np.array(totals)


def group_hulls(offset: np.ndarray, value: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Options on each group's upper concave hull of value over cost, in exact arithmetic: (options int64, int64 [g]).

    From the cheapest option (the best of them, the first of equals) on, as far as the value rises; points on a line
    between others are left out. The next corner is the dearer, better option with the steepest line to it.
    """
    hull, length = [], []
    for begin, end in itertools.pairwise(offset):
        points = [(Fraction(float(cost[o])), Fraction(float(value[o])), o) for o in range(begin, end)]
        corners = [min(points, key=lambda point: (point[0], -point[1], point[2]))]
        while True:
            c0, v0, _ = corners[-1]
            further = [(c, v, o) for c, v, o in points if v > v0]
            if not further:
                break
            # Of equally steep ones the farthest, so that none lies between corners; of equal points the first.
            corners.append(max(further, key=lambda point: ((point[1] - v0) / (point[0] - c0), point[0], -point[2])))
        hull += [o for _, _, o in corners]
        length.append(len(corners))
    return np.array(hull), np.array(length)


def exhaustive_optimum(
    offset: np.ndarray, value: np.ndarray, cost__ro: np.ndarray, capacity: np.ndarray
) -> tuple[float, np.ndarray] | None:
    """The largest value of all allocations that fit, and one that has it; None if none fits. All sums by fsum.

    Time grows with the product of the group sizes: for tests.
    """
    best: tuple[float, np.ndarray] | None = None
    for choice in itertools.product(*(range(begin, end) for begin, end in itertools.pairwise(offset))):
        chosen = list(choice)
        if any(math.fsum(row[chosen]) > limit for row, limit in zip(cost__ro, capacity, strict=True)):
            continue
        total = math.fsum(value[chosen])
        if best is None or total > best[0]:
            best = total, np.array(chosen)
    return best
