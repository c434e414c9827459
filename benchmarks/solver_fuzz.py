"""Random, hostile and charged instances of the solver against exhaustive search: what must never happen, counted.

    python benchmarks/solver_fuzz.py --count 100000 --output benchmarks/results/solver_fuzz.json

Families:

- ``random``: ties, tenths, exact budgets, scales apart (tests/optimization/instances.py);
- ``hostile``: values and costs of any magnitude that float64 has, mixed in one problem, capacities of 0, of infinity
  and of exactly what an allocation uses;
- ``charged``: group charges, nested and crossing, and the charge of the lowest stage
  (tests/optimization/charged_instances.py).

Counted: budgets exceeded, bounds below the optimum, "optimal" that is not, "infeasible" that is not, errors that blame
the solver. An instance that is refused by name (numbers too far apart) is counted as refused. Every second instance is
solved with refine. The optimum comes from ``exhaustive_at_once``, on every 100th instance also from the definition, one
allocation after the other; that the two differ is counted, too. The counts so far are written every thousand, so a run
may be stopped; families that a command leaves out keep what the file has of them.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "optimization"))

from charged_instances import exhaustive, exhaustive_at_once, random_charged
from instances import problem_of, random_problem

from layerlens.exceptions import InfeasibleError, OptimizationError
from layerlens.models import AllocationProblem
from layerlens.optimization import solve

# An allocation that is worth this share of the bound less than the optimum may be called optimal: gap_tolerance.
TOLERANCE = 1e-6
CHECKED_EVERY = 100
Best = tuple[float, np.ndarray] | None


def hostile(seed: int) -> AllocationProblem:
    """A small problem of numbers far apart."""
    rng = np.random.default_rng([21, seed])
    m = int(rng.integers(1, 4))
    sizes: list[int] = []
    while len(sizes) < 6 and math.prod([*sizes, 4]) <= 200:
        sizes.append(int(rng.integers(1, 5)))
    n = sum(sizes)

    def numbers(*shape: int) -> np.ndarray:
        kind = int(rng.integers(0, 6))
        mantissa = rng.choice([1.0, 1.0, 0.1, 0.3, 3.0, 7.25], shape) * rng.choice([1.0, 1.0, 1.0, 0.0], shape)
        if kind == 0:
            return mantissa * 10.0 ** rng.uniform(-320.0, 306.0, shape)
        if kind == 1:
            return mantissa * rng.choice([1.0, 1e16], shape)
        if kind == 2:
            return mantissa * rng.choice([5e-324, 1e-300, 1.0, 1e300], shape)
        if kind == 3:
            return mantissa * 10.0 ** float(rng.uniform(-310.0, 306.0))
        if kind == 4:
            return mantissa * 10.0 ** rng.uniform(-30.0, 30.0, shape)
        return mantissa

    value, cost = numbers(n), np.stack([numbers(n) for _ in range(m)])
    if rng.random() < 0.3:
        value = value * rng.choice([1.0, -1.0], n)
    offset = np.concatenate(([0], np.cumsum(sizes)))
    with_none = rng.random() < 0.6
    if with_none:
        cost[:, offset[:-1]] = 0.0
        value[offset[:-1]] = 0.0
    choice = [int(rng.integers(begin, end)) for begin, end in itertools.pairwise(offset)]
    capacity = np.array([sum_or_inf(row[choice]) for row in cost])
    kind = int(rng.integers(0, 5))
    if kind == 1:
        capacity = np.nextafter(capacity, rng.choice([0.0, np.inf], m))
    elif kind == 2:
        capacity[int(rng.integers(0, m))] = np.inf
    elif kind == 3:
        with np.errstate(over="ignore"):
            capacity = capacity * rng.uniform(0.5, 3.0, m)
    elif kind == 4:
        capacity[int(rng.integers(0, m))] = 0.0
    return problem_of(sizes, value, cost, np.maximum(capacity, 0.0), with_none=with_none)


def sum_or_inf(values: np.ndarray) -> float:
    """Correctly rounded, infinity where it overflows."""
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf


def best_by_trying(problem: AllocationProblem) -> Best:
    """The optimum of a problem whose sums may overflow."""
    if problem.charged:
        return exhaustive(problem)
    best: Best = None
    for each in itertools.product(*(range(a, b) for a, b in itertools.pairwise(problem.offset))):
        chosen = list(each)
        value = sum_or_inf(problem.value[chosen])
        if best is not None and value <= best[0]:
            continue
        if all(sum_or_inf(row[chosen]) <= c for row, c in zip(problem.cost__ro, problem.capacity, strict=True)):
            best = value, np.array(chosen)
    return best


FAMILIES = {
    "random": lambda seed: random_problem(1_000_000 + seed, max_allocations=200),
    "hostile": hostile,
    "charged": lambda seed: random_charged(1_000_000 + seed, max_allocations=(20, 50, 150)[seed % 3]),
}


# What an error may say: numbers that are refused, and neither an allocation nor a proof that there is none.
SAID = {
    "too far apart": "refused by name",
    "is no float64": "refused by name",
    "no proof that there is none": "undecided, said so",
}


def best_checked(problem: AllocationProblem) -> Best:
    """By the fast way, compared with the definition.

    Raises:
        AssertionError: they differ.
    """
    best, defined = exhaustive_at_once(problem), exhaustive(problem)
    assert (best and best[0]) == (defined and defined[0]), (best, defined)
    return best


def optimum_of(family: str, *, checked: bool) -> Callable[[AllocationProblem], Best]:
    """What finds the optima of a family; only those of hostile instances may be sums that overflow."""
    if family == "hostile":
        return best_by_trying
    return best_checked if checked else exhaustive_at_once


def judge(
    problem: AllocationProblem, refine: bool, optimum: Callable[[AllocationProblem], Best] = best_by_trying
) -> str:
    """What happened, in a word or two."""
    try:
        best = optimum(problem)
    except AssertionError as error:
        return f"oracles differ: {error}"
    try:
        answer = solve(problem, refine=refine)
    except InfeasibleError:
        adapts = best is not None and any(problem.options[option].method != "none" for option in best[1])
        return "falsely infeasible" if adapts else "infeasible"
    except OptimizationError as error:
        said = next((name for text, name in SAID.items() if text in str(error)), None)
        return said or f"error: {error}"
    except Exception as error:
        return f"crash: {type(error).__name__}: {error}"
    used = [sum_or_inf(row) for row in problem.terms__rk(answer.choice)]
    if any(u > c for u, c in zip(used, problem.capacity, strict=True)) or not problem.allowed(answer.choice):
        return "budget exceeded"
    if best is None:
        return "budget exceeded"
    if answer.upper_bound < best[0]:
        return "bound below the optimum"
    if answer.status == "optimal":
        right = answer.value >= best[0] - TOLERANCE * abs(answer.upper_bound)
        return "proved optimal" if right else "falsely optimal"
    return "optimum found" if answer.value >= best[0] else "optimum missed, gap stated"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--count", type=int, default=100_000, help="instances of each family")
    parser.add_argument("--families", nargs="+", choices=sorted(FAMILIES), default=sorted(FAMILIES))
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many")
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the counts")
    options = parser.parse_args()
    counts: dict[str, collections.Counter[str]] = {family: collections.Counter() for family in options.families}
    bad: list[str] = []
    start = time.perf_counter()
    for index in range(options.count):
        seed = options.first + index
        for family in options.families:
            optimum = optimum_of(family, checked=index % CHECKED_EVERY == 0)
            outcome = judge(FAMILIES[family](seed), refine=seed % 2 == 1, optimum=optimum)
            counts[family][outcome.split(":")[0]] += 1
            if outcome.split(":")[0] in BAD:
                bad.append(f"{family} {seed}: {outcome}")
                print(bad[-1], flush=True)
        over = time.perf_counter() - start > 60.0 * options.minutes
        if options.output and (over or (index + 1) % 1000 == 0 or index + 1 == options.count):
            write(options.output, counts, bad, options.first, index + 1, time.perf_counter() - start)
        if over:
            break
    for family, each in counts.items():
        print(family, dict(sorted(each.items())))


BAD = (
    "budget exceeded", "bound below the optimum", "falsely optimal", "falsely infeasible", "error", "crash",
    "oracles differ",
)  # fmt: skip


def write(
    path: Path, counts: dict[str, collections.Counter[str]], bad: list[str], first: int, instances: int, seconds: float
) -> None:
    """The counts of these families, beside what the file has of others."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for family, each in counts.items():
        found[family] = {
            "instances": instances,
            "first_seed": first,
            "seconds_of_the_command": round(seconds),
            "outcomes": {**dict.fromkeys(BAD, 0), **dict(sorted(each.items()))},
            "bad": [line for line in bad if line.startswith(f"{family} ")],
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
