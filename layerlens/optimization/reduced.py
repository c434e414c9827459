"""The problem as the solver sees it: without options that cannot fit and without resources that cannot bind.

Nothing that could be part of an answer is lost, so an answer and a bound of the reduced problem are those of the whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from layerlens.exceptions import OptimizationError
from layerlens.kernels._knapsack import Instance, RowSummary, summarise_row
from layerlens.models import AllocationProblem
from layerlens.optimization.problem import exact_sum

# Beyond these binary exponents products and sums could overflow or lose bits; rows are then scaled by a power of two,
# which is exact.
LARGEST_EXPONENT = 300
UNIT_ROUNDOFF = 2.0**-53
# The greatest binary exponent between two values, or between a cost and its capacity: beyond it scaling would flush.
LARGEST_RANGE = 900
# Values with up to so many binary digits after the point are searched for a common divisor, unless there are too many.
FRACTION_BITS, UNIT_OPTIONS = 8, 200_000
# What the kernels are compiled for.
MAX_RESOURCES = 64
# Relative error, with plenty to spare, of a plainly rounded sum; a row whose dearest options all but fill its capacity
# is kept, which costs nothing but time.
SUM_ROUNDING = 1e-9


@dataclass(frozen=True)
class Reduced:
    """An instance for the kernels, and how to read it.

    Args:
        instance: offsets, values (-inf where an option cannot fit), cost rows and capacities.
        rows: the resources of the problem that the instance keeps.
        scale_exponents: the instance's cost row i is 2**scale_exponents[i] times the problem's.
        value_exponent: the instance's values are 2**value_exponent times the problem's.
        largest_value: the largest |value| of the instance.
        value_unit: every sum of values is a multiple of it (exactly, in the instance's units); 0 where none is known.
    """

    instance: Instance
    rows: np.ndarray
    scale_exponents: np.ndarray
    value_exponent: int
    largest_value: float
    value_unit: float

    def bound(self, price: np.ndarray, best: np.ndarray) -> float:
        """A proved upper bound on the instance's optimum: p·C + Σ_g best_g, with all rounding errors added.

        ``best_g`` comes from m products and m differences, so its error is at most γ(|v| + Σ p c) with γ = (2m+2)u for
        the option in question; summed over the options of an allocation that fits, Σ p c is at most Σ p C(1+u). The
        sums themselves are correctly rounded (fsum). Products that underflow add at most 2^-1074 each.
        """
        capacity = self.instance.capacity
        n, m = self.instance.n_groups, len(price)
        priced = exact_sum(price * capacity)
        size = n * self.largest_value + priced
        margin = (2 * m + 10) * UNIT_ROUNDOFF * size + (n + 1) * (m + 1) * 2.0**-1074
        return self.round_down(exact_sum((exact_sum(best), priced, margin)))

    def rounding(self, price: np.ndarray) -> float:
        """How far a computed regret can lie from the exact one, for options that fit the capacities."""
        return 64.0 * UNIT_ROUNDOFF * (self.largest_value + float(np.sum(price * self.instance.capacity)))

    def round_down(self, bound: float) -> float:
        """The largest attainable value that ``bound`` allows: values are multiples of the value unit.

        Where the quotient is itself rounded up to an integer, the result is not below the bound. From 2^53 on every
        float64 is an integer, and the quotient of a bound near the largest one is none.
        """
        if self.value_unit == 0.0 or not math.isfinite(bound):
            return bound
        units = bound / self.value_unit
        return bound if abs(units) >= 2.0**53 else math.floor(units) * self.value_unit


@dataclass(frozen=True)
class Summary:
    """What one pass over the numbers of a problem says.

    Args:
        value: of the values.
        costs: of each row of costs.
    """

    value: RowSummary
    costs: tuple[RowSummary, ...]

    @classmethod
    def of(cls, problem: AllocationProblem, threads: int) -> Summary:
        """Raises OptimizationError where a number cannot be used."""
        offset = np.ascontiguousarray(problem.offset, dtype=np.int64)
        summary = cls(
            value=summarise_row(offset, np.ascontiguousarray(problem.value, dtype=np.float64), threads),
            costs=tuple(summarise_row(offset, row, threads) for row in problem.cost__ro),
        )
        if not summary.value.finite:
            raise OptimizationError("the problem has values that are not finite")
        for resource, row in zip(problem.resources, summary.costs, strict=True):
            if not row.finite or row.lowest < 0.0:
                raise OptimizationError(f"the problem has {resource} costs that are negative or not finite")
        return summary


def reduce(problem: AllocationProblem, summary: Summary | None = None) -> Reduced:
    """Drop what cannot matter. The problem must have passed ``check_feasible``."""
    summary = summary or Summary.of(problem, threads=1)
    offset = np.ascontiguousarray(problem.offset, dtype=np.int64)
    value = np.ascontiguousarray(problem.value, dtype=np.float64)
    largest = max(summary.value.highest, -summary.value.lowest)
    # Costs are never negative and rounding is monotone, so an option above a capacity cannot be part of an answer.
    too_large = None
    for row, capacity, row_summary in zip(problem.cost__ro, problem.capacity, summary.costs, strict=True):
        if row_summary.highest > capacity:
            too_large = (row > capacity) if too_large is None else too_large | (row > capacity)
    if too_large is not None:
        value = np.where(too_large, -np.inf, value)
        largest = float(np.max(np.abs(value), where=~too_large, initial=0.0))
    value_exponent = _refuse_range(value, largest, offset)
    if value_exponent:
        value, largest = np.ldexp(value, value_exponent), math.ldexp(largest, value_exponent)
    rows, exponents, cost_rows, capacities = [], [], [], []
    for r, (row, capacity) in enumerate(zip(problem.cost__ro, problem.capacity, strict=True)):
        most = summary.costs[r].sum_of_highest
        if too_large is not None and most > capacity:
            most = exact_sum(np.maximum.reduceat(np.where(too_large, 0.0, row), offset[:-1]))
        if most * (1.0 + SUM_ROUNDING) <= capacity:
            continue  # even the dearest options fit together
        exponent = _scaling(float(capacity))
        _refuse_costs(row, too_large, float(capacity), problem.resources[r])
        rows.append(r)
        exponents.append(exponent)
        if exponent and too_large is not None:
            row = np.where(too_large, 0.0, row)  # scaled, such a cost may be infinite; its option is out already
        cost_rows.append(np.ldexp(row, exponent) if exponent else np.ascontiguousarray(row))
        capacities.append(math.ldexp(float(capacity), exponent))
    if len(rows) > MAX_RESOURCES:
        raise OptimizationError(
            f"{len(rows)} budgets can bind; the solver takes at most {MAX_RESOURCES}, so drop or join user resources"
        )
    return Reduced(
        instance=Instance(offset, value, cost_rows, np.array(capacities, dtype=np.float64)),
        rows=np.array(rows, dtype=np.int64),
        scale_exponents=np.array(exponents, dtype=np.int64),
        value_exponent=value_exponent,
        largest_value=largest,
        value_unit=_unit(value, largest * (len(offset) - 1)),
    )


def _refuse_range(value: np.ndarray, largest: float, offset: np.ndarray) -> int:
    """The scaling of values; refuses those whose sums overflow or that lie so far apart that some would be lost.

    Raises:
        OptimizationError: names the least and the greatest.
    """
    n_groups = len(offset) - 1
    if largest > np.finfo(np.float64).max / (4.0 * (n_groups + 1)):
        raise OptimizationError(
            f"values of up to {largest:g} in {n_groups} layers: their sum exceeds float64; divide all values by a "
            "constant"
        )
    size = np.abs(value)
    if np.count_nonzero(size < math.ldexp(largest, -LARGEST_RANGE)) > np.count_nonzero(size == 0.0):
        least = float(np.min(size, where=size > 0.0, initial=largest))
        raise OptimizationError(
            f"values from {least:g} to {largest:g} lie too far apart to be added exactly; the solver accepts a factor "
            f"of at most 2**{LARGEST_RANGE}. Set the smallest to 0"
        )
    return _scaling(largest)


def _refuse_costs(row: np.ndarray, too_large: np.ndarray | None, capacity: float, resource: str) -> None:
    """Refuse costs so far below their capacity that they would be lost beside it; as :func:`_refuse_range`."""
    if np.count_nonzero(row < math.ldexp(capacity, -LARGEST_RANGE)) <= np.count_nonzero(row == 0.0):
        return
    used = row > 0.0 if too_large is None else (row > 0.0) & ~too_large
    least = float(np.min(row, where=used, initial=capacity))
    if least < math.ldexp(capacity, -LARGEST_RANGE):
        raise OptimizationError(
            f"{resource} costs of {least:g} beside a capacity of {capacity:g} lie too far apart to be added exactly; "
            f"the solver accepts a factor of at most 2**{LARGEST_RANGE}. Set the smallest to 0"
        )


def _unit(value: np.ndarray, largest_sum: float) -> float:
    """The greatest common divisor of values that are multiples of 2**-FRACTION_BITS with exact sums, else 0."""
    if len(value) > UNIT_OPTIONS or largest_sum >= 2.0 ** (52 - FRACTION_BITS):
        return 0.0
    scaled = np.ldexp(value[np.isfinite(value)], FRACTION_BITS)
    if not np.array_equal(scaled, np.floor(scaled)):
        return 0.0
    return math.ldexp(float(np.gcd.reduce(scaled.astype(np.int64))), -FRACTION_BITS)


def _scaling(size: float) -> int:
    """The power of two that brings ``size`` near 1 where it lies far from it, else 0."""
    exponent = math.frexp(size)[1]
    return -exponent if size > 0.0 and abs(exponent) > LARGEST_EXPONENT else 0
