"""Charges as the kernels see them: items, and an and-or graph that says which items a choice may be made of.

An *item* is a run of options of one layer that cause the same charges, so that only its best option matters; each
charge and each stage is an item with a single option. For given prices every item has a score, and the best choice is
found from the leaves up (cpp/knapsack/charges.cpp), in time linear in the graph:

- a layer takes the best of its items whose charges are open;
- a charge is open or not: a node with two rows. What it joins falls apart into independent parts in either row, which
  is why nested charges (a shared input in a block) cost one node each;
- the lowest stage is tried at every place by prefix sums over the parts.

A charge that a single layer causes is added to its options, charges of the same options are added to each other, and
one that joins several stages is a switch: tried both ways for the whole problem.

Parts that look alike (the blocks of a model) have one template.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from layerlens.exceptions import OptimizationError
from layerlens.kernels._knapsack import Charges
from layerlens.models import AllocationProblem
from layerlens.optimization.problem import exact_sum
from layerlens.optimization.template import LocalItem, Template, build_template

# Sets of switches that are tried, and nodes of the graph, beyond which charges are too entangled to be solved exactly.
MAX_SWITCH_SETS, MAX_NODES = 64, 400_000


@dataclass(frozen=True)
class Structure:
    """The problem as items.

    Args:
        offset: int64 [n_items + 1], options of each item: runs of the problem's options first, in their order, then one
            option for each charge, for each stage, and one that is impossible.
        value: float64 [options], those of the problem less penalties that one layer causes; -penalty for charges.
        cost__ro: float64 [r, options], likewise.
        group: int64 [n_items], the problem's group of each run of options; -1 for the others.
        charges: the graph.
        part__g: int64 [n_groups], the part of each group.
        n_stages, n_switches: of the graph; mode s * n_switches + w.
        impossible: the option that is impossible.
        n_runs: how many items are runs of options; the first ones.
        cause__ik: int64 [n_runs, k], charges that each run causes, padded with -1; charge c is item n_runs + c.
        reaches__i, below__i: bool [n_runs], whether a run is possible only where its stage is reached, or is not.
        stage__g: int64 [n_groups], the stage of each group, -1 outside the chain.
        sets: the charges of the problem that are on with each set of switches.
        set_charges: the same as charges of the graph.
        switched: the charges of the problem that are switches.
    """

    offset: np.ndarray
    value: np.ndarray
    cost__ro: np.ndarray
    group: np.ndarray
    charges: Charges
    part__g: np.ndarray
    n_stages: int
    n_switches: int
    impossible: int
    n_runs: int
    cause__ik: np.ndarray
    reaches__i: np.ndarray
    below__i: np.ndarray
    stage__g: np.ndarray
    sets: tuple[tuple[int, ...], ...]
    set_charges: tuple[frozenset[int], ...]
    switched: frozenset[int]


@dataclass(frozen=True)
class _Shared:
    """What several layers pay once: costs and penalties of charges, and who causes them (option-charge pairs).

    ``members`` are the problem's charges that each stands for.
    """

    cost__cr: np.ndarray
    penalty: np.ndarray
    option: np.ndarray
    charge: np.ndarray
    members: list[list[int]]


def build_structure(problem: AllocationProblem) -> Structure:
    """The items and the graph of a problem with charges that ``check_charges`` has seen.

    Raises:
        OptimizationError: charges are too entangled.
    """
    n_options, n_groups = len(problem.options), len(problem.layers)
    offset = np.asarray(problem.offset, dtype=np.int64)
    group__o = np.repeat(np.arange(n_groups), np.diff(offset))
    value, cost__ro, shared = _settle(problem, group__o)
    n_charges = len(shared.penalty)
    stage__g = np.full(n_groups, -1) if problem.depth is None else np.asarray(problem.depth.stage__g)
    n_stages = 0 if problem.depth is None else len(problem.depth.names)
    is_switch = _switches(shared, stage__g[group__o])
    reaches, below = problem.reaches__o, _below(problem, stage__g[group__o])

    first, cause__ik = _runs(offset, shared, reaches, below)
    n_runs = len(first)
    run_group = group__o[first]
    part__g, n_parts = _parts(stage__g, run_group, cause__ik, is_switch)
    sets = _switch_sets(shared, is_switch)

    # Parts in the order of their first group; items and groups of each.
    items_of_part = np.split(
        np.argsort(part__g[run_group], kind="stable"),
        np.cumsum(np.bincount(part__g[run_group], minlength=n_parts))[:-1],
    )
    graph = _Graph(n_runs + n_charges + n_stages + 1)
    templates: dict[tuple, Template] = {}
    stage__p = np.full(n_parts, -1)
    root = np.empty((n_parts, len(sets), 2), dtype=np.int64)
    reach_i, below_i = reaches[first].tolist(), below[first].tolist()
    causes = [tuple(charge for charge in row if charge >= 0) for row in cause__ik.tolist()]
    switch = is_switch.tolist()
    groups = run_group.tolist()
    impossible = n_runs + n_charges + n_stages
    for part, own in enumerate(items_of_part):
        items = own.tolist()
        local_group: dict[int, int] = {}
        local_charge: dict[int, int] = {}
        key = []
        for item in items:
            group = local_group.setdefault(groups[item], len(local_group))
            inner = tuple(local_charge.setdefault(c, len(local_charge)) for c in causes[item] if not switch[c])
            outer = tuple(c for c in causes[item] if switch[c])
            key.append(LocalItem(group, inner, outer, reach_i[item], below_i[item]))
        staged = [stage__g[group] for group in local_group if stage__g[group] >= 0]
        stage__p[part] = staged[0] if staged else -1
        known = (tuple(key), stage__p[part] >= 0)
        if known not in templates:
            templates[known] = build_template(known[0], sets, known[1], MAX_NODES)
        charge_items = [n_runs + charge for charge in local_charge]
        root[part] = graph.add(templates[known], own, np.array(charge_items, dtype=np.int64), impossible)
        if graph.n_nodes > MAX_NODES:
            raise OptimizationError(_entangled(f"more than {MAX_NODES} nodes"))
    switch_root = [graph.node([[n_runs + charge for charge in sorted(each)]]) for each in sets]
    if n_stages == 0:
        extra_cost, extra_value = np.zeros((0, len(problem.resources))), np.zeros(0)
    else:
        assert problem.depth is not None
        extra_cost = np.asarray(problem.depth.cost__sr, dtype=np.float64)
        extra_value = -(np.zeros(n_stages) if problem.depth.penalty__s is None else problem.depth.penalty__s)
    return Structure(
        offset=np.concatenate((first, n_options + np.arange(n_charges + n_stages + 2))),
        value=np.concatenate((value, -shared.penalty, extra_value, [0.0])),
        cost__ro=np.ascontiguousarray(
            np.concatenate((cost__ro, shared.cost__cr.T, extra_cost.T, np.zeros((len(problem.resources), 1))), axis=1)
        ),
        group=np.concatenate((run_group, np.full(n_charges + n_stages + 1, -1))),
        charges=graph.finish(stage__p, root, n_runs + n_charges + np.arange(n_stages), switch_root),
        part__g=part__g,
        n_stages=n_stages,
        n_switches=len(sets),
        impossible=n_options + n_charges + n_stages,
        n_runs=n_runs,
        cause__ik=cause__ik,
        reaches__i=reaches[first],
        below__i=below[first],
        stage__g=stage__g,
        sets=tuple(tuple(sorted(m for charge in each for m in shared.members[charge])) for each in sets),
        set_charges=tuple(sets),
        switched=frozenset(m for charge in np.flatnonzero(is_switch) for m in shared.members[charge]),
    )


def check_charges(problem: AllocationProblem) -> None:
    """Raise OptimizationError where a charge or the depth charge has numbers or indices that mean nothing."""
    n_resources, n_options = len(problem.resources), len(problem.options)
    costs = [np.asarray(charge.cost__r) for charge in problem.charges]
    fine = [cost.shape == (n_resources,) for cost in costs]
    if costs and all(fine):  # at once: a test of each array takes longer than its numbers
        cost__cr = np.array(costs)
        fine = np.all(np.isfinite(cost__cr) & (cost__cr >= 0.0), axis=1).tolist()
    for index, charge in enumerate(problem.charges):
        where = f"charge {index} ({charge.name})"
        if not fine[index]:
            raise OptimizationError(
                f"{where}: expected {n_resources} finite costs of at least 0, got {costs[index].tolist()}"
            )
        if not 0.0 <= charge.penalty < np.inf:
            raise OptimizationError(f"{where}: the penalty must be finite and at least 0, got {charge.penalty}")
        if charge.options and not 0 <= min(charge.options) <= max(charge.options) < n_options:
            raise OptimizationError(f"{where}: options must lie between 0 and {n_options - 1}")
        at, steps = charge.inside, 0
        while at is not None:
            if not 0 <= at < len(problem.charges) or steps > len(problem.charges):
                raise OptimizationError(
                    f"{where}: lies inside {charge.inside}, which is not a charge or lies inside it"
                )
            at, steps = problem.charges[at].inside, steps + 1
    depth = problem.depth
    if depth is None:
        return
    stage, cost__sr = np.asarray(depth.stage__g), np.asarray(depth.cost__sr)
    n_stages = len(depth.names)
    if n_stages < 1 or stage.shape != (len(problem.layers),) or stage.min() < -1 or stage.max() >= n_stages:
        raise OptimizationError(
            f"depth: expected a stage from -1 to {n_stages - 1} for each of the layers, got {stage}"
        )
    if cost__sr.shape != (n_stages, n_resources) or not np.all(np.isfinite(cost__sr) & (cost__sr >= 0.0)):
        raise OptimizationError(f"depth: expected {n_stages} × {n_resources} finite costs of at least 0")
    penalty = np.zeros(n_stages) if depth.penalty__s is None else np.asarray(depth.penalty__s)
    if penalty.shape != (n_stages,) or not np.all(np.isfinite(penalty) & (penalty >= 0.0)):
        raise OptimizationError(f"depth: expected {n_stages} finite penalties of at least 0")
    rising = np.flatnonzero(np.any(np.diff(cost__sr, axis=0) > 0.0, axis=1) | (np.diff(penalty) > 0.0))
    if rising.size:
        low, high = depth.names[rising[0]], depth.names[rising[0] + 1]
        raise OptimizationError(f"depth: stage {high} costs more than {low}, which lies below it and includes it")
    for name, flags in (("reaches__o", depth.reaches__o), ("below__o", depth.below__o)):
        if flags is not None and np.shape(flags) != (n_options,):
            raise OptimizationError(f"depth: {name} has shape {np.shape(flags)}, expected ({n_options},)")
    if np.any(problem.reaches__o & _below(problem, np.repeat(stage, np.diff(problem.offset)))):
        raise OptimizationError("depth: an option cannot both reach its stage and be possible only below it")


def _entangled(what: str) -> str:
    return (
        f"the charges join layers in too many ways to be solved exactly ({what}); join charges that the same layers "
        "cause, or add those of the least cost to their options"
    )


def _below(problem: AllocationProblem, stage__o: np.ndarray) -> np.ndarray:
    if problem.depth is None or problem.depth.below__o is None:
        return np.zeros(len(problem.options), dtype=bool)
    return np.asarray(problem.depth.below__o, dtype=bool) & (stage__o >= 0)


def _settle(problem: AllocationProblem, group__o: np.ndarray) -> tuple[np.ndarray, np.ndarray, _Shared]:
    """Values and costs with the charges of single layers added, and the charges that several layers share.

    Sums are correctly rounded, so a cost above a capacity still means that the option is in no answer.
    """
    value, cost__ro = np.asarray(problem.value, dtype=np.float64), np.asarray(problem.cost__ro, dtype=np.float64)
    option, charge = problem.causes.option, problem.causes.charge
    n_charges, m = len(problem.charges), len(problem.resources)
    cost__cr = np.array([c.cost__r for c in problem.charges], dtype=np.float64).reshape(n_charges, m)
    penalty = np.array([c.penalty for c in problem.charges], dtype=np.float64)
    pairs = np.unique(charge * len(problem.layers) + group__o[option])
    layers_of = np.bincount(pairs // len(problem.layers), minlength=n_charges)
    single = layers_of[charge] == 1
    if single.any():
        value, cost__ro = value.copy(), cost__ro.copy()
        own, counts = np.unique(option[single], return_counts=True)
        once = single & np.isin(option, own[counts == 1])
        cost__ro[:, option[once]] += cost__cr[charge[once]].T
        value[option[once]] -= penalty[charge[once]]
        for several in own[counts > 1]:
            added = charge[single & (option == several)]
            for r in range(m):
                cost__ro[r, several] = exact_sum([cost__ro[r, several], *cost__cr[added, r]])
            value[several] = exact_sum([value[several], *-penalty[added]])
    option, charge = option[~single], charge[~single]
    # Charges of the same options are one.
    order = np.argsort(charge, kind="stable")
    charge_ids, begins = np.unique(charge[order], return_index=True)
    same: dict[bytes, list[int]] = {}
    ends = np.append(begins[1:], len(order))
    for each, begin, end in zip(charge_ids.tolist(), begins.tolist(), ends.tolist()[: len(begins)], strict=True):
        same.setdefault(option[order[begin:end]].tobytes(), []).append(each)
    new = np.full(max(n_charges, 1), -1)
    for index, members in enumerate(same.values()):
        new[members[0]] = index
    merged = list(same.values())
    kept = new[charge] >= 0
    option, charge = option[kept], new[charge[kept]]
    order = np.lexsort((charge, option))
    firsts = np.array([members[0] for members in merged], dtype=np.int64)
    summed__cr, summed = cost__cr[firsts], penalty[firsts]
    for index, members in enumerate(merged):
        if len(members) > 1:
            summed__cr[index] = [exact_sum(column) for column in cost__cr[members].T]
            summed[index] = exact_sum(penalty[members])
    return (
        value,
        cost__ro,
        _Shared(
            cost__cr=summed__cr,
            penalty=summed,
            option=option[order],
            charge=charge[order],
            members=merged,
        ),
    )


def _switches(shared: _Shared, stage__o: np.ndarray) -> np.ndarray:
    """bool [charges]: those that options of several stages cause."""
    n_charges = len(shared.penalty)
    lowest, highest = np.full(n_charges, np.iinfo(np.int64).max), np.full(n_charges, -1)
    stage = stage__o[shared.option]
    staged = stage >= 0
    np.minimum.at(lowest, shared.charge[staged], stage[staged])
    np.maximum.at(highest, shared.charge[staged], stage[staged])
    return highest > lowest


def _switch_sets(shared: _Shared, is_switch: np.ndarray) -> list[frozenset[int]]:
    """The sets of switches that make sense: whatever has all options of another charge is on when that one is."""
    switches = np.flatnonzero(is_switch).tolist()
    options = {c: frozenset(shared.option[shared.charge == c].tolist()) for c in switches}
    needs = {c: {d for d in switches if d != c and options[c] < options[d]} for c in switches}
    sets: list[frozenset[int]] = [frozenset()]
    for switch in sorted(switches, key=lambda c: -len(options[c])):
        sets += [each | {switch} for each in sets if needs[switch] <= each]
        if len(sets) > MAX_SWITCH_SETS:
            raise OptimizationError(_entangled(f"{len(switches)} charges join layers of several stages"))
    return sets


def _runs(offset: np.ndarray, shared: _Shared, reaches: np.ndarray, below: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First option of each run of options of a group that cause the same, and what they cause, int64 [items, k]."""
    n_options = int(offset[-1])
    start = np.searchsorted(shared.option, np.arange(n_options + 1))
    width = int(np.diff(start).max(initial=0))
    cause__ok = np.full((n_options, width), -1, dtype=np.int64)
    cause__ok[shared.option, np.arange(len(shared.option)) - start[shared.option]] = shared.charge
    new = np.zeros(n_options, dtype=bool)
    new[offset[:-1]] = True
    new[1:] |= np.any(cause__ok[1:] != cause__ok[:-1], axis=1)
    new[1:] |= (reaches[1:] != reaches[:-1]) | (below[1:] != below[:-1])
    first = np.flatnonzero(new)
    return first, cause__ok[first]


def _parts(
    stage__g: np.ndarray, run_group: np.ndarray, cause__ik: np.ndarray, is_switch: np.ndarray
) -> tuple[np.ndarray, int]:
    """The part of each group, in the order of their first groups, and how many there are.

    Charges may join stages by a layer outside the chain. Then such a charge becomes a switch, too, until none does.
    """
    while True:
        part__g, n_parts = _joined(len(stage__g), run_group, cause__ik, is_switch)
        lowest, highest = np.full(n_parts, np.iinfo(np.int64).max), np.full(n_parts, -1)
        staged = stage__g >= 0
        np.minimum.at(lowest, part__g[staged], stage__g[staged])
        np.maximum.at(highest, part__g[staged], stage__g[staged])
        mixed = np.flatnonzero(highest > lowest)
        if not mixed.size:
            return part__g, n_parts
        # Of each such part the charge that joins most layers to one outside the chain.
        item, column = np.nonzero(cause__ik >= 0)
        charge, group = cause__ik[item, column], run_group[item]
        pair = np.unique(charge * len(stage__g) + group)
        joins = np.bincount(pair // len(stage__g), minlength=len(is_switch))
        joins[is_switch] = 0
        outside = np.zeros(len(is_switch), dtype=bool)
        outside[charge[stage__g[group] < 0]] = True
        for part in mixed:
            own = np.unique(charge[part__g[group] == part])
            own = own[outside[own] & ~is_switch[own]]
            is_switch[own[np.argmax(joins[own])]] = True


def _joined(
    n_groups: int, run_group: np.ndarray, cause__ik: np.ndarray, is_switch: np.ndarray
) -> tuple[np.ndarray, int]:
    """The connected components of the groups under the charges that are no switches."""
    n_charges = len(is_switch)
    item, column = np.nonzero(cause__ik >= 0)
    charge = cause__ik[item, column]
    joins = ~is_switch[charge] if n_charges else np.zeros(0, dtype=bool)
    if not joins.any():
        return np.arange(n_groups), n_groups
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    size = n_groups + n_charges
    edges = coo_matrix((np.ones(int(joins.sum())), (run_group[item[joins]], n_groups + charge[joins])), (size, size))
    _, label = connected_components(edges, directed=False)
    _, first, inverse = np.unique(label[:n_groups], return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse.reshape(-1)], len(first)


class _Graph:
    """Nodes, rows and children, collected part by part."""

    def __init__(self, n_items: int) -> None:
        self.n_items, self.n_nodes = n_items, 0
        self.rows_of_node: list[np.ndarray] = []
        self.children_of_row: list[np.ndarray] = []
        self.child: list[np.ndarray] = []

    def add(self, template: Template, items: np.ndarray, charge_items: np.ndarray, impossible: int) -> np.ndarray:
        """Add a part; its roots, int64 [switch sets, 2]."""
        nodes = self.n_items + self.n_nodes + np.arange(template.n_nodes)
        known = np.concatenate((items, charge_items, nodes, [impossible]))
        self.rows_of_node.append(template.rows_of_node)
        self.children_of_row.append(template.children_of_row)
        self.child.append(known[template.child])
        self.n_nodes += template.n_nodes
        found: np.ndarray = known[template.root]
        return found

    def node(self, rows: list[list[int]]) -> int:
        """Add one node of items; its number."""
        self.rows_of_node.append(np.array([len(rows)]))
        self.children_of_row.append(np.array([len(row) for row in rows]))
        self.child += [np.array(row, dtype=np.int64) for row in rows]
        self.n_nodes += 1
        return self.n_items + self.n_nodes - 1

    def finish(self, stage: np.ndarray, root: np.ndarray, stage_item: np.ndarray, switch_root: list[int]) -> Charges:
        def begins(counts: list[np.ndarray]) -> np.ndarray:
            return np.concatenate(([0], np.cumsum(np.concatenate(counts)))) if counts else np.zeros(1, dtype=np.int64)

        child = np.concatenate(self.child) if self.child else np.zeros(0, dtype=np.int64)
        return Charges(
            self.n_items, begins(self.rows_of_node), begins(self.children_of_row), child, stage, root, stage_item,
            switch_root,
        )  # fmt: skip
