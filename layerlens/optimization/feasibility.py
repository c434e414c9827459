"""Budgets that allow nothing: which ones conflict, and the smallest that would do, in the user's own key names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_CEILING, Context, Decimal

import numpy as np

from layerlens.exceptions import InfeasibleError
from layerlens.models import AllocationProblem
from layerlens.models.model_spec import NONE
from layerlens.optimization.constraints import COUNT_ROW, JOIN
from layerlens.optimization.problem import exact_sum, option_name
from layerlens.vocabulary import RESOURCES

BUDGET_KEYS = {name: f"optimization.{resource.budget}" for name, resource in RESOURCES.items()}

ROUNDING = 1e-12
# Options that a glance looks at.
GLANCE = 64


def obviously_feasible(problem: AllocationProblem) -> bool:
    """Whether a glance shows that ``check_feasible`` will pass: the first options cost nothing and another one fits."""
    first = problem.offset[:-1]
    if np.any(problem.capacity < 0.0) or np.any(problem.cost__ro[:, first]):
        return False
    for option in range(min(len(problem.options), GLANCE)):
        if problem.options[option].method != NONE and np.all(problem.cost__ro[:, option] <= problem.capacity):
            return True
    return False


def check_feasible(problem: AllocationProblem) -> None:
    """Raise InfeasibleError if no allocation fits, or none that adapts a single layer.

    Decided one option at a time, every other layer at its cheapest in each resource. That is exact where each layer
    can be left alone at no cost, as in every problem of :func:`build_problem`. Where some layer has only options that
    cost something, a problem may pass and still have no allocation that fits; :func:`solve` then finds out.
    """
    if not problem.resources:
        return
    first = problem.offset[:-1]
    with np.errstate(over="ignore", invalid="ignore"):
        cheapest__rg = np.minimum.reduceat(problem.cost__ro, first, axis=1)
        least = np.array([exact_sum(row) for row in cheapest__rg])
        group = np.repeat(np.arange(len(problem.layers)), np.diff(problem.offset))
        need__ro = (least[:, None] - cheapest__rg[:, group]) + problem.cost__ro
    # Needs are rounded sums, so only what exceeds a capacity by more than their rounding counts; the least total and a
    # single cost are compared exactly.
    with np.errstate(over="ignore", invalid="ignore"):
        widened = problem.capacity + ROUNDING * np.abs(problem.capacity)
    limit = np.where((least > 0.0) & np.isfinite(widened), widened, problem.capacity)
    fits__ro = (need__ro <= limit[:, None]) & (problem.cost__ro <= problem.capacity[:, None])
    fits__ro &= (least <= problem.capacity)[:, None]
    fits__o = np.all(fits__ro, axis=0)
    adapts = np.array([option.method != NONE for option in problem.options])
    stuck = np.flatnonzero(~np.logical_or.reduceat(fits__o, first))
    if stuck.size:
        candidates = np.arange(problem.offset[stuck[0]], problem.offset[stuck[0] + 1])
        if adapts[candidates].any():
            candidates = candidates[adapts[candidates]]
    elif adapts.any() and not bool(np.any(fits__o & adapts)):
        candidates = np.flatnonzero(adapts)
    else:
        return
    if (problem.capacity < least).any() and adapts.any():
        candidates = np.flatnonzero(adapts)  # the cheapest way to adapt anything, whichever layer was stuck first
    raise InfeasibleError(*_message(problem, candidates, need__ro[:, candidates], fits__ro[:, candidates], least))


def _message(
    problem: AllocationProblem, candidates: np.ndarray, need__rc: np.ndarray, fits__rc: np.ndarray, least: np.ndarray
) -> tuple[str, dict[str, float]]:
    """What to say, and the smallest budgets that would do."""
    alternatives, smallest = [], {}
    for r in range(len(problem.resources)):
        others_fit = np.flatnonzero(np.all(np.delete(fits__rc, r, axis=0), axis=0))
        if others_fit.size:
            cheapest = others_fit[np.argmin(need__rc[r, others_fit])]
            smallest[problem.resources[r]] = float(problem.base[r] + need__rc[r, cheapest])
            alternatives.append(_single(problem, r, float(need__rc[r, cheapest]), int(candidates[cheapest]), least))
    if alternatives:
        return "; or ".join(alternatives), smallest
    total__rc = need__rc + problem.base[:, None]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        worst__c = np.max(np.where(fits__rc, 0.0, total__rc / problem.budget[:, None]), axis=0)
    nearest = int(np.argmin(worst__c))
    exceeded = [r for r in range(len(problem.resources)) if not fits__rc[r, nearest]]
    wanted = " and ".join(
        f"{budget_key(problem.resources[r])} to at least {_smallest(problem, r, float(need__rc[r, nearest]))} "
        f"(got {_given(problem.budget[r])})"
        for r in exceeded
    )
    smallest = {problem.resources[r]: float(total__rc[r, nearest]) for r in exceeded}
    told = (
        f"{len(exceeded)} budgets are too small for any option, and raising one alone is not enough: raise {wanted}, "
        f"which allows {option_name(problem.options[int(candidates[nearest])])}"
    )
    return told, smallest


def conflict_message(problem: AllocationProblem, needs: Sequence[float | None]) -> str:
    """What to say where each budget allows something but all together allow nothing.

    Args:
        problem: the problem.
        needs: for each resource, the least that an allocation within all other budgets uses of it; None where no
            allocation keeps the others.
    """
    ways = [_change(problem, r, need) for r, need in enumerate(needs) if need is not None]
    named = " and ".join(_plain_key(resource) for resource in problem.resources)
    if not ways:
        return f"{named} conflict, and changing one of them alone is not enough; relax several"
    return f"{named} conflict: no allocation keeps them all; {', or '.join(ways)}"


def _change(problem: AllocationProblem, r: int, need: float) -> str:
    """The smallest change of one limit that lets an allocation use ``need``, as an instruction."""
    key, resource = _plain_key(problem.resources[r]), problem.resources[r]
    if _count_method(resource) is None:
        return f"raise {key} to {_smallest(problem, r, need)} (got {_given(problem.budget[r])})"
    n_layers = sum(len(name.split(JOIN)) for name in problem.layers)
    return f"lower {key} to {n_layers - math.ceil(need)} (got {n_layers - round(problem.budget[r])})"


def _count_method(resource: str) -> str | None:
    """The method whose least number of layers the resource stands for; None for real resources."""
    before = COUNT_ROW.format("")
    return resource.removeprefix(before) if resource.startswith(before) else None


def _plain_key(resource: str) -> str:
    method = _count_method(resource)
    return budget_key(resource) if method is None else f"optimization.constraints.min_layers.{method}"


def _single(problem: AllocationProblem, r: int, need: float, option: int, least: np.ndarray) -> str:
    key, given = budget_key(problem.resources[r]), _given(problem.budget[r])
    if problem.capacity[r] < 0.0:
        problem_text = f"{given} is less than the frozen model alone needs ({_number(problem.base[r])})"
    elif least[r] > problem.capacity[r]:
        problem_text = f"{given} is too small even with the cheapest option of every layer"
    else:
        problem_text = f"{given} is too small for any option"
    return (
        f"{key}: {problem_text}; the smallest that works is {_smallest(problem, r, need)} "
        f"({option_name(problem.options[option])})"
    )


def budget_key(resource: str) -> str:
    """The configuration key of a resource's budget."""
    method = _count_method(resource)
    if method is not None:
        return f"optimization.constraints.min_layers.{method} (as the most layers without it)"
    return BUDGET_KEYS.get(resource, f"optimization.constraints.resources.{resource}.budget")


def _smallest(problem: AllocationProblem, r: int, need: float) -> str:
    """The smallest budget whose difference to the base is at least ``need``, rounded up to six digits."""
    budget = problem.base[r] + need
    while budget - problem.base[r] < need:
        budget = np.nextafter(budget, np.inf)
    if problem.resources[r] == "trainable_params" and math.isfinite(budget):
        return str(math.ceil(budget))
    return _number(budget)


def _given(value: float) -> str:
    """As the user wrote it: the shortest text that reads back as the same number."""
    return str(int(value)) if _is_whole(value) else repr(float(value))


def _number(value: float) -> str:
    """Six significant digits, rounded up, so that a budget copied from a message is never too small."""
    if _is_whole(value):
        return str(int(value))
    if not math.isfinite(value):
        return f"{value}"
    nearest = f"{float(value):.6g}"
    if float(nearest) >= value:  # 0.01 is 0.01, although its binary value lies a little above
        return nearest
    return f"{float(Context(prec=6, rounding=ROUND_CEILING).create_decimal(Decimal(float(value)))):.6g}"


def _is_whole(value: float) -> bool:
    return bool(abs(value) < 1e15 and value == int(value))
