"""A charged mode as a plain problem: each part is a group, and each of its possible joint choices an option.

Only joint choices whose regrets together leave a chance are listed, so there are few of them once an allocation is
known. Everything that searches plain problems then searches charged ones.

Costs of joint choices are rounded down and values up, so what fits fits here too, and the bound stays one; what is
found is checked against the budgets exactly. Where the sums are exact, as for whole numbers, nothing is rounded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from layerlens.kernels._knapsack import Instance
from layerlens.optimization.charged import Charged, State
from layerlens.optimization.lagrangian import Dual
from layerlens.optimization.reduced import Reduced

# The limit grows to what is wanted in steps of this factor, from this share of it on.
FIRST_SHARE, GROWTH = 1.0 / 64.0, 4.0


@dataclass(frozen=True)
class Compounds:
    """The plain problem of one mode.

    Args:
        reduced: its instance; the last group has one option: the depth and the switches of the mode.
        options: for each of its options, the options of the charged problem.
        dual: at the mode's prices.
        limit: joint choices with more regret are not listed; infinity where all are.
    """

    reduced: Reduced
    options: list[tuple[int, ...]]
    dual: Dual
    limit: float

    def choice(self, compound: np.ndarray) -> np.ndarray:
        """int64 [n_groups] of the charged problem."""
        return np.sort(np.array([option for each in compound for option in self.options[each]], dtype=np.int64))


Joint = list[tuple[float, tuple[int, ...]]]
"""Joint choices: the regret and the options of each."""


class TooManyError(Exception):
    """More joint choices than wanted."""


def build_compounds(
    charged: Charged, state: State, mode: int, bound: float, limit: float, most: int, also: Sequence[np.ndarray]
) -> Compounds | None:
    """The mode's joint choices with regret at most ``limit``, or less where there are more than ``most``.

    Args:
        charged: the problem.
        state: prices of the mode.
        mode: which.
        bound: what they prove.
        limit: regret above which nothing matters.
        most: joint choices in all.
        also: allocations of the mode whose joint choices are listed whatever their regret.

    Returns None where not even the favourites can be listed.
    """
    found, reached = None, 0.0
    at = limit * FIRST_SHARE or limit  # where all values are 0, the limit is a rounding error that has no 64th
    while True:
        try:
            listed = _listed(charged, state, mode, min(at, limit), most)
        except TooManyError:
            break
        found, reached = listed, min(at, limit)
        if not at < limit:
            break
        # Numbers grow at least with the limit, so the next step is left out where it would surely be too much.
        if sum(map(len, found)) * GROWTH > most and at * GROWTH < limit:
            break
        at *= GROWTH
    if found is None:
        return None
    for each in also:
        _add(charged, found, each)
    return _plain(charged, state, mode, bound, found, math.inf if reached >= limit else reached)


def _listed(charged: Charged, state: State, mode: int, limit: float, most: int) -> list[list[tuple[int, ...]]]:
    """For each part the joint choices within ``limit``, the favourite first."""
    structure = charged.structure
    graph = structure.charges
    s, w = divmod(mode, structure.n_switches)
    _, option, regret = charged.instance.select_core(state.price, state.best, limit, int(structure.offset[-1]))
    begin = np.searchsorted(option, structure.offset).tolist()
    option, regret = option.tolist(), regret.tolist()
    n_items, value = len(structure.group), state.value.tolist()
    node_begin, row_begin, child = graph.node_begin, graph.row_begin, graph.child
    n_runs, room = structure.n_runs, most

    def joint(at: int, left: float) -> Joint:
        """(regret, options) of what an item or node can be, by rising regret."""
        if at < n_items:
            if at >= n_runs:
                return [(0.0, ())]
            one: Joint = [(regret[k], (option[k],)) for k in range(begin[at], begin[at + 1]) if regret[k] <= left]
            one.sort()
            return one
        node = at - n_items
        both: dict[tuple[int, ...], float] = {}
        for row in range(node_begin[node], node_begin[node + 1]):
            children = child[row_begin[row] : row_begin[row + 1]].tolist()
            total = 0.0
            for each in children:
                total += value[each]
            lost = value[at] - total
            if not lost <= left:
                continue
            made: Joint = [(lost, ())]
            for each in children:
                if each >= n_runs and each < n_items:
                    continue
                more = joint(each, left - lost)
                wider: Joint = []
                for first, chosen in made:
                    for second, added in more:
                        if first + second > left:
                            break
                        wider.append((first + second, chosen + added))
                if len(wider) > room:
                    raise TooManyError
                wider.sort()
                made = wider
            for lost_here, chosen in made:
                if lost_here < both.get(chosen, math.inf):
                    both[chosen] = lost_here
        return sorted((lost, chosen) for chosen, lost in both.items())

    found = []
    total = 0
    for part, stage in enumerate(graph.stage.tolist()):
        below = 1 if 0 <= stage < s else 0
        seen: dict[tuple[int, ...], None] = {}
        for _, chosen in joint(int(graph.root[part, w, below]), limit):
            seen.setdefault(tuple(sorted(chosen)))
        found.append(list(seen))
        total += len(seen)
        if total > most:
            raise TooManyError
    return found


def _add(charged: Charged, found: list[list[tuple[int, ...]]], choice: np.ndarray) -> None:
    part = charged.structure.part__g
    order = np.argsort(part, kind="stable")
    for index, groups in enumerate(np.split(order, np.cumsum(np.bincount(part))[:-1])):
        own = tuple(np.sort(choice[groups]).tolist())
        if own not in found[index]:
            found[index].append(own)


def _plain(
    charged: Charged, state: State, mode: int, bound: float, found: list[list[tuple[int, ...]]], limit: float
) -> Compounds:
    problem, structure, reduced = charged.problem, charged.structure, charged.reduced
    s, w = divmod(mode, structure.n_switches)
    fixed = structure.sets[w]
    n_options, n_charges = len(problem.options), len(problem.charges)
    # Columns: options, charges, stages.
    columns: list[list[int]] = []
    options: list[tuple[int, ...]] = []
    caused: dict[int, frozenset[int]] = {}
    for part in found:
        for chosen in part:
            paid: set[int] = set()
            for each in chosen:
                if each not in caused:
                    caused[each] = frozenset(problem.causes.of(each).tolist()) - structure.switched
                paid |= caused[each]
            columns.append([*chosen, *(n_options + c for c in sorted(paid))])
            options.append(chosen)
    columns.append([n_options + c for c in fixed] + ([n_options + n_charges + s] if s < structure.n_stages else []))
    options.append(())
    lengths = np.array([len(each) for each in columns])
    flat = np.array([c for each in columns for c in each], dtype=np.int64)
    depth = problem.depth
    stage_cost = (
        np.zeros((0, len(problem.resources))) if depth is None else np.asarray(depth.cost__sr, dtype=np.float64)
    )
    stage_penalty = (
        np.zeros(len(stage_cost)) if depth is None or depth.penalty__s is None else np.asarray(depth.penalty__s)
    )
    rows = []
    for index, r in enumerate(reduced.rows):
        amounts = np.concatenate((problem.cost__ro[r], [c.cost__r[r] for c in problem.charges], stage_cost[:, r]))
        rows.append(np.ldexp(_sums(amounts[flat], lengths, -1), int(reduced.scale_exponents[index])))
    worth = np.concatenate((problem.value, [-c.penalty for c in problem.charges], -stage_penalty))
    value = np.ldexp(_sums(worth[flat], lengths, 1), reduced.value_exponent)
    offset = np.cumsum([0, *(len(part) for part in found), 1])
    instance = Instance(offset, value, rows, reduced.instance.capacity)
    plain = dataclasses.replace(reduced, instance=instance, largest_value=float(np.abs(value).max()))
    favourites, best, totals = instance.score_groups(state.price, charged.threads)
    return Compounds(plain, options, Dual(state.price, bound, favourites, best, totals[:1]), limit)


def _sums(terms: np.ndarray, lengths: np.ndarray, direction: int) -> np.ndarray:
    """Sum of each run of terms, rounded up (direction 1) or down (-1) where it is not exact."""
    begin = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    sums = np.zeros(len(lengths))
    some = lengths > 0
    sums[some] = np.add.reduceat(terms, begin[some]) if len(terms) else 0.0
    size = np.zeros(len(lengths))
    size[some] = np.add.reduceat(np.abs(terms), begin[some]) if len(terms) else 0.0
    if np.array_equal(terms, np.floor(terms)) and float(size.max(initial=0.0)) < 2.0**53:
        return sums
    values = terms.tolist()
    for index, (first, length) in enumerate(zip(begin.tolist(), lengths.tolist(), strict=True)):
        if length < 2:
            continue
        own = values[first : first + length]
        total = math.fsum(own)
        error = math.fsum([*own, -total])
        if error * direction > 0.0:
            total = math.nextafter(total, math.inf * direction)
        sums[index] = total
    return sums
