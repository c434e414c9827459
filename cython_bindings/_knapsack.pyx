# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Instance, dual, core and local search of the multiple-choice knapsack (cpp/knapsack).

Checks and allocates; the C++ side computes with the GIL released. Letters in names: g groups, o options, r resources,
c candidates of the core, k cuts. `layerlens.optimization` is the caller.
"""

from typing import NamedTuple

from libc.stdint cimport int64_t, uint64_t
from libc.math cimport HUGE_VAL, fabs
cimport knapsack as ks
from layerlens.kernels._dispatch cimport Isa, active_isa, usable_threads

import numpy as np


cdef class Instance:
    """One knapsack problem, checked once, whose arrays the kernels then read in place.

    Args:
        offset: int64 [n_groups + 1], strictly increasing from 0.
        value: float64 [n_options]; -inf marks an option that may not be chosen.
        cost_rows: one float64 [n_options] array for each resource.
        capacity: float64 [n_resources], all > 0.
    """

    cdef ks.Instance data
    cdef const double* rows[64]
    cdef readonly object offset, value, cost_rows, capacity

    def __init__(self, offset, value, cost_rows, capacity):
        self.offset = np.ascontiguousarray(offset, dtype=np.int64)
        self.value = np.ascontiguousarray(value, dtype=np.float64)
        self.cost_rows = tuple(np.ascontiguousarray(row, dtype=np.float64) for row in cost_rows)
        self.capacity = np.ascontiguousarray(capacity, dtype=np.float64)
        n_options = self.value.shape[0]
        if len(self.cost_rows) != self.capacity.shape[0] or len(self.cost_rows) > ks.kMaxResources:
            raise ValueError(f"{len(self.cost_rows)} cost rows for {self.capacity.shape[0]} capacities; "
                             f"at most {ks.kMaxResources} resources are possible")
        if any(row.shape != (n_options,) for row in self.cost_rows):
            raise ValueError(f"each cost row needs {n_options} entries")
        _check_offset(self.offset, n_options)
        if not bool(np.all(self.capacity > 0.0)):
            raise ValueError("every capacity must be above 0")
        cdef const int64_t[::1] offset_view = self.offset
        cdef const double[::1] view = self.value
        self.data.offset = &offset_view[0]
        self.data.value = &view[0]
        for r in range(len(self.cost_rows)):
            view = self.cost_rows[r]
            self.rows[r] = &view[0]
        self.data.cost = self.rows
        if self.capacity.size:
            view = self.capacity
            self.data.capacity = &view[0]
        else:
            self.data.capacity = NULL
        self.data.n_groups = self.offset.shape[0] - 1
        self.data.n_resources = len(self.cost_rows)

    @property
    def n_groups(self):
        return self.data.n_groups

    @property
    def n_resources(self):
        return self.data.n_resources

    def score_groups(self, double[::1] price, threads=1):
        """Favourite of each group at these prices: (choice [g], its score [g], totals [2 + r])."""
        if price.shape[0] != self.data.n_resources:
            raise ValueError(f"{price.shape[0]} prices for {self.data.n_resources} resources")
        choice = np.empty(self.data.n_groups, dtype=np.int64)
        best = np.empty(self.data.n_groups)
        totals = np.empty(2 + self.data.n_resources)
        cdef int64_t[::1] choice_view = choice
        cdef double[::1] best_view = best, totals_view = totals
        cdef const double* price_data = &price[0] if price.shape[0] else NULL
        cdef Isa isa = <Isa>active_isa()
        cdef int workers = usable_threads(threads)
        with nogil:
            ks.score_groups(isa, self.data, price_data, &choice_view[0], &best_view[0], &totals_view[0], workers)
        return choice, best, totals

    def select_reachable(self, const double[::1] price, const double[::1] reach, const int64_t[::1] choice,
                         const double[::1] best, threads=1):
        """Options that can be a favourite at prices within reach of price: (options, how many of each group).

        `choice` and `best` are what score_groups found at `price`.
        """
        cdef int m = self.data.n_resources
        cdef int64_t n_groups = self.data.n_groups, found
        if price.shape[0] != m or reach.shape[0] != m or choice.shape[0] != n_groups or best.shape[0] != n_groups:
            raise ValueError("price, reach, choice or best has the wrong length")
        option = np.empty(self.value.shape[0], dtype=np.int64)
        count = np.empty(n_groups, dtype=np.int64)
        cdef int64_t[::1] option_view = option, count_view = count
        cdef int workers = usable_threads(threads)
        with nogil:
            found = ks.select_reachable(self.data, &price[0], &reach[0], &choice[0], &best[0], &option_view[0],
                                        &count_view[0], workers)
        return option[:found], count

    def select_core(self, double[::1] price, const double[::1] best, double limit, int64_t room):
        """Options whose regret is at most limit: (how many, the first `room` of them, their regrets)."""
        if price.shape[0] != self.data.n_resources or best.shape[0] != self.data.n_groups:
            raise ValueError("price or best has the wrong length")
        option = np.empty(max(room, 1), dtype=np.int64)
        regret = np.empty(max(room, 1))
        cdef int64_t[::1] option_view = option
        cdef double[::1] regret_view = regret
        cdef const double* price_data = &price[0] if price.shape[0] else NULL
        cdef int64_t found
        with nogil:
            found = ks.select_core(self.data, price_data, &best[0], limit, room, &option_view[0], &regret_view[0])
        kept = min(found, room)
        return found, option[:kept], regret[:kept]


cdef class Charges:
    """What is paid once beside the options of an instance's items: see ``Charges`` in knapsack.hpp.

    Args:
        n_items: groups of the instance.
        node_begin, row_begin, child: int64, the and-or graph.
        stage: int64 [n_parts].
        root: int64 [n_parts, n_switches, 2].
        stage_item: int64 [n_stages].
        switch_root: int64 [n_switches].
    """

    cdef ks.Charges data
    cdef readonly object node_begin, row_begin, child, stage, root, stage_item, switch_root
    cdef object value, by_stage, scores, stack, items
    cdef double[::1] value_v, by_stage_v, scores_v
    cdef int64_t[::1] stack_v, items_v

    def __init__(self, n_items, node_begin, row_begin, child, stage, root, stage_item, switch_root):
        self.node_begin, self.row_begin, self.child, self.stage, self.root, self.stage_item, self.switch_root = (
            np.ascontiguousarray(array, dtype=np.int64)
            for array in (node_begin, row_begin, child, stage, root, stage_item, switch_root)
        )
        n_nodes, n_parts, n_switches = len(self.node_begin) - 1, len(self.stage), len(self.switch_root)
        n_stages, n_rows = len(self.stage_item), len(self.row_begin) - 1
        if self.root.shape != (n_parts, n_switches, 2) or n_switches < 1 or n_nodes < 0 or n_rows < 0:
            raise ValueError(f"root has shape {self.root.shape}, expected ({n_parts}, {n_switches}, 2)")
        most = n_items + np.repeat(np.repeat(np.arange(n_nodes), np.diff(self.node_begin)), np.diff(self.row_begin))
        if (
            self.node_begin[0] != 0 or self.node_begin[n_nodes] != n_rows or np.any(np.diff(self.node_begin) < 1)
            or self.row_begin[0] != 0 or self.row_begin[n_rows] != len(self.child) or np.any(np.diff(self.row_begin) < 0)
            or np.any(self.child < 0) or np.any(self.child >= most)
            or np.any(self.root < 0) or np.any(self.root >= n_items + n_nodes)
            or np.any(self.stage < -1) or np.any(self.stage >= n_stages)
            or np.any(self.stage_item < 0) or np.any(self.stage_item >= n_items)
            or np.any(self.switch_root < -1) or np.any(self.switch_root >= n_items + n_nodes)
        ):
            raise ValueError("the and-or graph refers to what is not there, or to a later node")
        self.value, self.by_stage = np.empty(n_items + n_nodes + 1), np.empty(2 * (n_stages + 1))
        self.scores = np.empty((n_stages + 1) * n_switches)
        self.stack = np.empty(n_items + n_nodes + 1, dtype=np.int64)
        self.items = np.empty(n_items + n_nodes + 1, dtype=np.int64)
        self.value_v, self.by_stage_v, self.scores_v = self.value, self.by_stage, self.scores
        self.stack_v, self.items_v = self.stack, self.items
        self.data.n_items, self.data.n_nodes, self.data.n_parts = n_items, n_nodes, n_parts
        self.data.n_stages, self.data.n_switches = n_stages, n_switches
        cdef int64_t[::1] view = self.node_begin
        self.data.node_begin = &view[0]
        view = self.row_begin
        self.data.row_begin = &view[0]
        self.data.child = _start(self.child)
        self.data.stage = _start(self.stage)
        self.data.root = _start(self.root.reshape(-1))
        self.data.stage_item = _start(self.stage_item)
        self.data.switch_root = _start(self.switch_root)

    @property
    def n_modes(self):
        return self.scores.shape[0]

    cdef double best_mode(self, const double* best, int64_t only, int64_t* mode) noexcept nogil:
        """The best score of all modes, or of ``only`` where it is not -1, and its mode."""
        cdef int64_t i
        ks.score_modes(self.data, best, &self.value_v[0], &self.by_stage_v[0], &self.scores_v[0])
        mode[0] = only
        if only < 0:
            mode[0] = 0
            for i in range(1, self.scores_v.shape[0]):
                if self.scores_v[i] > self.scores_v[mode[0]]:
                    mode[0] = i
        return self.scores_v[mode[0]]

    cdef int64_t take(self, int64_t mode) noexcept nogil:
        return ks.items_of_mode(self.data, &self.value_v[0], mode, &self.stack_v[0], &self.items_v[0])

    def score_modes(self, const double[::1] best):
        """Value of every item and node, and the best score of each mode."""
        if best.shape[0] != self.data.n_items:
            raise ValueError(f"{best.shape[0]} scores for {self.data.n_items} items")
        cdef int64_t mode = 0
        self.best_mode(&best[0], -1, &mode)
        return self.value[: self.data.n_items + self.data.n_nodes].copy(), self.scores.copy()

    def items_of(self, const double[::1] value, int64_t mode):
        """int64, the items of the best choice of a mode, given the values that score_modes returned."""
        if value.shape[0] != self.data.n_items + self.data.n_nodes or not 0 <= mode < self.scores.shape[0]:
            raise ValueError(f"{value.shape[0]} values or mode {mode} do not belong to this graph")
        cdef int64_t found
        with nogil:
            found = ks.items_of_mode(self.data, &value[0], mode, &self.stack_v[0], &self.items_v[0])
        return self.items[:found].copy()


cdef const int64_t* _start(const int64_t[::1] array) noexcept:
    return &array[0] if array.shape[0] else NULL


cdef inline bint _held_back(double step, double reach, double low, double high) noexcept nogil:
    """Whether the box, and not the edge of what is allowed, stops this step."""
    return (step >= high and high == reach) or (step <= low and low == -reach)


def minimise_dual(Instance instance, start, double[::1] radius, double tolerance, int max_evaluations, threads=1,
                  farthest=np.inf, Charges charges=None, int64_t mode=-1):
    """Minimise bound(p) = p.C + sum of the favourites' scores over p >= 0 by cutting planes within a box.

    The box lies around the best point so far and grows or shrinks with success (box step: Marsten, Hogan &
    Blankenship 1975). Multipliers are scaled: lambda_r = p_r * capacity_r, value for the whole budget.

    Args:
        start: float64 [n_resources] first multipliers, scaled.
        radius: float64 [n_resources] first half-widths of the box, scaled, > 0.
        tolerance: stops when the model's optimum lies within this share of the best bound.
        max_evaluations: evaluations of the bound at most.
        farthest: float64 [n_resources] or a number, how far from start the minimum is sought, scaled.
        charges: what is paid once; the groups of the instance are then its items.
        mode: with charges, the only mode that counts; -1: the best one does.

    Returns:
        (multipliers [r], bounds [k], points [k, r]): the best scaled multipliers, and every bound and point evaluated.
    """
    cdef int m = instance.data.n_resources, r, i, k = 0, best_cut = 0, expansions = 0
    cdef double bound, best_bound, gap = 0.0
    cdef bint on_side, success
    cdef Isa isa = <Isa>active_isa()
    cdef int workers = usable_threads(threads)
    capacity = instance.capacity
    center = np.array(start, dtype=np.float64)
    if center.shape != (m,) or radius.shape[0] != m or m == 0:
        raise ValueError(f"start and radius need {m} entries, and there must be a resource")
    n_groups = instance.n_groups
    choice = np.empty(n_groups, dtype=np.int64)
    best = np.empty(n_groups)
    totals = np.empty(2 + m)
    price = np.empty(m)
    values = np.empty(max_evaluations)
    uses = np.empty((max_evaluations, m))
    bounds = np.empty(max_evaluations)
    points = np.empty((max_evaluations, m))
    basis = np.zeros(m + 1, dtype=np.intc)
    low, high, point, weight = np.empty(m), np.empty(m), center.copy(), np.empty(m + 1)
    reach = np.array(radius)
    lowest, highest = np.maximum(center - farthest, 0.0), center + farthest
    shifted, held = np.empty(max_evaluations), np.zeros(m, dtype=np.intc)

    cdef int64_t[::1] choice_v = choice
    cdef double[::1] best_v = best, totals_v = totals, price_v = price, values_v = values, bounds_v = bounds
    cdef double[:, ::1] uses_v = uses, points_v = points
    cdef double[::1] low_v = low, high_v = high, point_v = point, weight_v = weight, center_v = center, reach_v = reach
    cdef double[::1] lowest_v = lowest, highest_v = highest, shifted_v = shifted
    cdef int[::1] held_v = held
    cdef const double[::1] capacity_v = capacity
    cdef int[::1] basis_v = basis
    cdef int64_t best_mode = -1, n_taken
    cdef bint charged = charges is not None
    if charged and (charges.data.n_items != n_groups or mode >= charges.n_modes):
        raise ValueError(f"charges of {charges.data.n_items} items do not belong to {n_groups} groups")

    with nogil:
        best_bound = 0.0
        while True:
            for r in range(m):
                price_v[r] = point_v[r] / capacity_v[r]
            ks.score_groups(isa, instance.data, &price_v[0], &choice_v[0], &best_v[0], &totals_v[0], workers)
            if charged:
                totals_v[0] = charges.best_mode(&best_v[0], mode, &best_mode)
                n_taken = charges.take(best_mode)
                ks.item_totals(instance.data, &choice_v[0], &charges.items_v[0], n_taken, &totals_v[1])
            bound = totals_v[0]
            values_v[k] = totals_v[1]
            for r in range(m):
                bound = bound + point_v[r]
                uses_v[k, r] = totals_v[2 + r] / capacity_v[r]
                points_v[k, r] = point_v[r]
            bounds_v[k] = bound
            if k == 0:
                best_bound = bound
                ks.first_basis(m, 0, &uses_v[0, 0], &basis_v[0])
            elif bound < best_bound:
                success = best_bound - bound >= 0.3 * gap
                best_bound = bound
                best_cut = k
                for r in range(m):
                    if success and held_v[r]:
                        reach_v[r] = 3.0 * reach_v[r]
                    center_v[r] = point_v[r]
            else:
                for r in range(m):
                    reach_v[r] = 0.5 * reach_v[r]
            k += 1
            if k == max_evaluations:
                break
            # The next point; where the model is solved but the box holds it back, the box grows first.
            while True:
                # The master works with differences to the center, which are small numbers near the end.
                for r in range(m):
                    low_v[r] = max(-reach_v[r], lowest_v[r] - center_v[r])
                    high_v[r] = min(reach_v[r], highest_v[r] - center_v[r])
                for i in range(k):
                    shifted_v[i] = values_v[i] - best_bound
                    for r in range(m):
                        shifted_v[i] = shifted_v[i] + center_v[r] * (1.0 - uses_v[i, r])
                gap = -ks.solve_master(m, k, &shifted_v[0], &uses_v[0, 0], &low_v[0], &high_v[0], &basis_v[0],
                                       &point_v[0], &weight_v[0])
                if gap == HUGE_VAL:  # rounding made the basis useless: once more from the best cut
                    ks.first_basis(m, best_cut, &uses_v[best_cut, 0], &basis_v[0])
                    gap = -ks.solve_master(m, k, &shifted_v[0], &uses_v[0, 0], &low_v[0], &high_v[0], &basis_v[0],
                                           &point_v[0], &weight_v[0])
                if gap > tolerance * fabs(best_bound):
                    break
                on_side = False
                for r in range(m):
                    if _held_back(point_v[r], reach_v[r], low_v[r], high_v[r]):
                        on_side = True
                        reach_v[r] = 8.0 * reach_v[r]
                if not on_side or expansions == 200:
                    break
                expansions += 1
            if not gap > tolerance * fabs(best_bound) or gap == HUGE_VAL:
                break
            for r in range(m):
                held_v[r] = _held_back(point_v[r], reach_v[r], low_v[r], high_v[r])
                point_v[r] = max(center_v[r] + point_v[r], 0.0)
    return center, bounds[:k].copy(), points[:k].copy()


cdef class Core:
    """The part of an instance that a search may change, with the use of the current allocation.

    Args:
        offset: int64 [n_groups + 1] of the core's groups.
        value: float64 [n_candidates].
        cost__cr: float64 [n_candidates, n_resources].
        capacity: float64 [n_resources].
    """

    cdef ks.Core data
    cdef readonly object offset, value, cost__cr, capacity

    def __init__(self, offset, value, cost__cr, capacity):
        self.offset = np.ascontiguousarray(offset, dtype=np.int64)
        self.value = np.ascontiguousarray(value, dtype=np.float64)
        self.cost__cr = np.ascontiguousarray(cost__cr, dtype=np.float64)
        self.capacity = np.ascontiguousarray(capacity, dtype=np.float64)
        n_candidates, m = self.value.shape[0], self.capacity.shape[0]
        if self.cost__cr.shape != (n_candidates, m) or m == 0 or m > ks.kMaxResources:
            raise ValueError(f"cost__cr has shape {self.cost__cr.shape}, expected ({n_candidates}, {m})")
        _check_offset(self.offset, n_candidates)
        cdef const int64_t[::1] offset_view = self.offset
        cdef const double[::1] value_view = self.value, capacity_view = self.capacity
        cdef const double[:, ::1] cost_view = self.cost__cr
        self.data.n_groups = self.offset.shape[0] - 1
        self.data.n_resources = m
        self.data.offset = &offset_view[0]
        self.data.value = &value_view[0]
        self.data.cost__cr = &cost_view[0, 0]
        self.data.capacity = &capacity_view[0]

    def local_search(self, double[::1] price, int64_t[::1] choice, double[:, ::1] use__r2, int64_t pair_limit):
        """Repair, then improve, `choice` and `use__r2` (high and low parts of each use) in place; whether it fits."""
        cdef int m = self.data.n_resources
        if price.shape[0] != m or choice.shape[0] != self.data.n_groups or use__r2.shape[0] != m or use__r2.shape[1] != 2:
            raise ValueError("price, choice or use has the wrong shape")
        cdef bint fits
        with nogil:
            fits = ks.repair(self.data, &price[0], &choice[0], <ks.Use*> &use__r2[0, 0])
            if fits:
                ks.improve(self.data, &price[0], pair_limit, &choice[0], <ks.Use*> &use__r2[0, 0])
        return fits

    def beam_search(self, double[::1] price, int64_t[::1] favourite, double threshold, int64_t[::1] choice,
                    int64_t width, double softness=3.0, uint64_t seed=0):
        """Search for an allocation worth more than threshold: (value, bound, truncations, work); see knapsack.hpp.

        Costs and capacities must be integers whose sums stay below 2**53. `choice` [g] is overwritten when one is found.
        """
        cdef int m = self.data.n_resources
        if price.shape[0] != m or favourite.shape[0] != self.data.n_groups or choice.shape[0] != self.data.n_groups:
            raise ValueError("price, favourite or choice has the wrong length")
        if width < 1 or width > 1 << 22 or not softness > 0.0:
            raise ValueError(f"width must lie between 1 and 2**22 and softness above 0, got {width} and {softness}")
        cdef ks.BeamSettings settings
        settings.width, settings.softness, settings.seed = width, softness, seed
        cdef ks.BeamResult result
        with nogil:
            result = ks.beam_search(self.data, settings, &price[0], &favourite[0], threshold, &choice[0])
        return result.value, result.bound, result.truncations, result.work


def sum_use(const double[::1] amount):
    """The total as an unevaluated sum (high, low); high is the total rounded to nearest."""
    cdef ks.Use use
    cdef const double* data = &amount[0] if amount.shape[0] else NULL
    with nogil:
        use = ks.sum_use(amount.shape[0], data)
    return use.high, use.low


class RowSummary(NamedTuple):
    """Least and greatest number of a row, the sums of each group's least and greatest, whether all are finite."""

    lowest: float
    highest: float
    sum_of_lowest: float
    sum_of_highest: float
    finite: bool


def summarise_row(const int64_t[::1] offset, const double[::1] row, threads=1):
    """RowSummary of one number for each option; the sums are plainly rounded."""
    cdef int64_t n_groups = offset.shape[0] - 1
    _check_offset(offset, row.shape[0])
    cdef ks.RowSummary found
    cdef int workers = usable_threads(threads)
    with nogil:
        found = ks.summarise_row(n_groups, &offset[0], &row[0], workers)
    return RowSummary(
        found.lowest, found.highest, found.sum_of_lowest, found.sum_of_highest, found.not_finite == 0.0
    )


cdef int _check_offset(const int64_t[::1] offset, Py_ssize_t n_options) except -1:
    """Offsets must rise strictly from 0 to the number of options."""
    cdef Py_ssize_t group, n_groups = offset.shape[0] - 1
    cdef bint fine = n_groups >= 1 and offset[0] == 0 and offset[n_groups] == n_options
    if fine:
        for group in range(n_groups):
            if offset[group + 1] <= offset[group]:
                fine = False
                break
    if not fine:
        raise ValueError(f"offset must rise strictly from 0 to the number of options, {n_options}")
    return 0


def group_hulls(const int64_t[::1] offset, const double[::1] value, const double[::1] cost, threads=1):
    """The options on each group's upper concave hull of value over cost: (options, how many of each group).

    Options come group after group, by rising cost and falling slope; the first is the best of the cheapest.
    """
    cdef int64_t n_groups = offset.shape[0] - 1
    _check_offset(offset, value.shape[0])
    if value.shape[0] != cost.shape[0]:
        raise ValueError(f"{value.shape[0]} values and {cost.shape[0]} costs")
    hull = np.empty(value.shape[0], dtype=np.int64)
    length = np.empty(n_groups, dtype=np.int64)
    cdef int64_t[::1] hull_view = hull, length_view = length
    cdef int workers = usable_threads(threads)
    cdef int64_t found
    with nogil:
        found = ks.group_hulls(n_groups, &offset[0], &value[0], &cost[0], &hull_view[0], &length_view[0], workers)
    return hull[:found], length
