"""Random problems with charges, small enough for exhaustive search, and the oracle that tries every allocation."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
from instances import problem_of

from layerlens.models import AllocationProblem, DepthCharge, GroupCharge


def random_charged(seed: int, max_allocations: int = 600) -> AllocationProblem:
    """Ties, tenths and scales far apart; nested, crossing and single charges; stages, forbidden and passing options."""
    rng = np.random.default_rng([2022, seed])
    m = int(rng.integers(1, 6))
    sizes: list[int] = []
    while len(sizes) < 9:
        size = int(rng.integers(1, 5))
        if math.prod([*sizes, size]) > max_allocations:
            break
        sizes.append(size)
    n, n_groups = sum(sizes), len(sizes)
    family = int(rng.integers(0, 5))
    scale__r = np.ones(m)
    if family == 0:
        draw = lambda *shape: rng.random(shape)  # noqa: E731
        value = rng.random(n)
    elif family == 1:
        draw = lambda *shape: rng.integers(0, 4, shape).astype(float)  # noqa: E731
        value = rng.integers(0, 5, n).astype(float)
    elif family == 2:
        draw = lambda *shape: rng.integers(1, 60, shape).astype(float)  # noqa: E731
        value = rng.integers(1, 100, n).astype(float)
    elif family == 3:
        draw = lambda *shape: rng.integers(0, 10, shape) * 0.1  # noqa: E731
        value = rng.integers(-5, 20, n) * 0.1
    else:
        scale__r = np.array([1e3, 1e9, 1e-3, 1.0, 10.0])[:m]
        draw = lambda *shape: np.round(rng.uniform(0.5, 8.0, shape), 4)  # noqa: E731
        value = np.sqrt(rng.integers(1, 33, n)) * rng.random(n)
    cost = draw(m, n) * scale__r[:, None]
    offset = np.concatenate(([0], np.cumsum(sizes)))
    with_none = rng.random() < 0.8
    if with_none:
        cost[:, offset[:-1]] = 0.0
        value[offset[:-1]] = 0.0
    group = np.repeat(np.arange(n_groups), sizes)
    paying = np.ones(n, dtype=bool)
    paying[offset[:-1]] = not with_none
    charges: list[GroupCharge] = []
    stage = np.sort(rng.integers(0, max(1, n_groups // 2), n_groups))
    for block in np.unique(stage):
        own = np.flatnonzero((stage[group] == block) & paying)
        if not own.size or rng.random() < 0.2:
            continue
        outer = None
        if rng.random() < 0.6:
            listed = tuple(own.tolist()) if rng.random() < 0.5 else ()
            charges.append(GroupCharge(f"block {block}", listed, draw(m) * scale__r))
            outer = len(charges) - 1
        for _ in range(int(rng.integers(0, 3))):
            some = own[rng.random(own.size) < 0.6]
            penalty = float(rng.random() < 0.2) * 0.25
            charges.append(GroupCharge("input", tuple(some.tolist()), draw(m) * scale__r, outer, penalty))
    if rng.random() < 0.25:  # joins what it likes, stages too
        some = np.flatnonzero(paying & (rng.random(n) < 0.4))
        charges.append(GroupCharge("everywhere", tuple(some.tolist()), draw(m) * scale__r))
    depth = None
    if rng.random() < 0.6:
        n_stages = int(stage.max()) + 1
        steps = draw(n_stages, m) * scale__r * (rng.random((n_stages, 1)) < 0.9)
        stage__g = np.where(rng.random(n_groups) < 0.85, stage, -1)
        below = None
        if rng.random() < 0.3 and with_none:  # groups whose "none" is possible only below, as for passing blocks
            below = np.zeros(n, dtype=bool)
            below[offset[:-1][rng.random(n_groups) < 0.2]] = True
        penalty = None if rng.random() < 0.7 else np.sort(rng.integers(0, 3, n_stages) * 0.25)[::-1].copy()
        depth = DepthCharge(
            stage__g, tuple(f"stage {s}" for s in range(n_stages)), np.cumsum(steps[::-1], axis=0)[::-1].copy(),
            below__o=below, penalty__s=penalty,
        )  # fmt: skip
    problem = problem_of(sizes, value, cost, np.ones(m), with_none=with_none)
    problem = dataclasses.replace(problem, charges=tuple(charges), depth=depth)
    dearest = [
        math.fsum([*np.maximum.reduceat(cost[r], offset[:-1]), *(c.cost__r[r] for c in charges)]) for r in range(m)
    ]
    capacity = np.array(dearest) * rng.uniform(0.1, 0.9, m)
    if rng.random() < 0.4:
        choice = np.array([int(rng.integers(begin, end)) for begin, end in itertools.pairwise(offset)])
        capacity = np.array([math.fsum(row) for row in problem.terms__rk(choice)])
    return dataclasses.replace(problem, capacity=capacity, budget=capacity.copy())


def exhaustive(problem: AllocationProblem) -> tuple[float, np.ndarray] | None:
    """The largest value of all allocations that fit, by trying each with the definition of its use; None: none fits."""
    best: tuple[float, np.ndarray] | None = None
    for each in itertools.product(*(range(a, b) for a, b in itertools.pairwise(problem.offset))):
        choice = np.array(each)
        value = math.fsum(problem.value_terms(choice))
        if best is not None and value <= best[0]:
            continue
        if not problem.allowed(choice):
            continue
        if any(math.fsum(row) > limit for row, limit in zip(problem.terms__rk(choice), problem.capacity, strict=True)):
            continue
        best = value, choice
    return best


def exhaustive_at_once(problem: AllocationProblem) -> tuple[float, np.ndarray] | None:
    """``exhaustive``, ten times as fast: matrices of all allocations leave few for the definition to decide.

    A row's sum of k terms in any order is off by at most (k - 1) eps Σ|terms|; ``slack`` is more than twice that. What
    lies above a capacity by more than it does not fit, and what lies below the best value by more than it is not the
    best. All others, in the order of their values, are summed as the definition says. For sums that are finite.
    """
    group = np.diff(problem.offset)
    choice__ag = np.stack(np.unravel_index(np.arange(math.prod(group.tolist())), group), axis=1) + problem.offset[:-1]
    causes__oc = np.zeros((len(problem.options), len(problem.charges)), dtype=bool)
    for index, charge in enumerate(problem.charges):
        at: int | None = index
        while at is not None:
            causes__oc[list(charge.options), at] = True
            at = problem.charges[at].inside
    paid__ac = causes__oc[choice__ag].any(axis=1)
    value = [problem.value[choice__ag], paid__ac * np.array([-charge.penalty for charge in problem.charges])]
    use__r = [
        [cost[choice__ag], paid__ac * np.array([charge.cost__r[r] for charge in problem.charges])]
        for r, cost in enumerate(problem.cost__ro)
    ]
    allowed = np.ones(len(choice__ag), dtype=bool)
    if (depth := problem.depth) is not None:
        stage__o = np.repeat(depth.stage__g, group)
        nothing = len(depth.names)
        stage__o = np.where(problem.reaches__o & (stage__o >= 0), stage__o, nothing)
        lowest__a = stage__o[choice__ag].min(axis=1)
        for r, parts in enumerate(use__r):
            parts.append(np.append(depth.cost__sr[:, r], 0.0)[lowest__a][:, None])
        if depth.penalty__s is not None:
            value.append(-np.append(depth.penalty__s, 0.0)[lowest__a][:, None])
        if depth.below__o is not None:
            reached__ag = (np.asarray(depth.stage__g) >= lowest__a[:, None]) & (lowest__a < nothing)[:, None]
            allowed = ~(depth.below__o[choice__ag] & reached__ag).any(axis=1)

    def summed(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        terms = np.concatenate(parts, axis=1)
        return terms.sum(axis=1), 4 * terms.shape[1] * np.finfo(float).eps * np.abs(terms).sum(axis=1)

    for parts, limit in zip(use__r, problem.capacity, strict=True):
        used, slack = summed(parts)
        allowed &= used - slack <= limit
    about, slack = summed(value)
    open_ = np.flatnonzero(allowed)
    best: tuple[float, np.ndarray] | None = None
    for a in open_[np.argsort(-(about + slack)[open_])]:
        if best is not None and about[a] + slack[a] < best[0]:
            break
        value_a = math.fsum(problem.value_terms(choice__ag[a]))
        if (best is None or value_a > best[0]) and problem.allowed(choice__ag[a]) and _fits(problem, choice__ag[a]):
            best = value_a, choice__ag[a]
    return best


def _fits(problem: AllocationProblem, choice: np.ndarray) -> bool:
    return all(math.fsum(row) <= limit for row, limit in zip(problem.terms__rk(choice), problem.capacity, strict=True))
