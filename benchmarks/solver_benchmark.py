"""The solver against CP-SAT alone and HiGHS alone, in one run: time, gap, and the ratio of the times.

    python benchmarks/solver_benchmark.py --layers 72 224 --limit 20 --output benchmarks/results/solver.json

Each instance is solved by

- ``first``: Lagrangian dual, guided search and beam searches, nothing that runs for a second (refine=False);
- ``full``: the same with the searches that prove optimality, CP-SAT on the core included (refine=True);
- ``cp-sat``: CP-SAT on the whole problem, all cores, with a time limit;
- ``highs``: HiGHS' branch and cut on the whole problem (scipy.optimize.milp), with a time limit.

Gaps are against the best bound that any of them proved. ``to reach`` is how long CP-SAT and HiGHS took to find an
allocation as good as ``first`` (CP-SAT only: HiGHS reports no incumbents through SciPy).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ortools
import scipy
from ortools.sat.python import cp_model
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from layerlens.bench.speeds import as_problem, transformer_problem
from layerlens.kernels import isa
from layerlens.models import AllocationProblem
from layerlens.optimization import solve
from layerlens.utils.processor import processor_name

# CP-SAT counts in integers: values and costs are scaled to sums of about this size.
INTEGER_SUM = 2**40


def random_problem(n_layers: int, *, hard: bool, seed: int = 0, n_options: int = 32) -> AllocationProblem:
    """Independent integer costs in 1..1000; values independent of them too, or (hard) close to their mean."""
    rng = np.random.default_rng([seed, n_layers, int(hard)])
    cost = rng.integers(1, 1000, (4, n_layers, n_options)).astype(float)
    cost[:, :, 0] = 0.0
    value = (
        cost.mean(axis=0) + rng.integers(0, 100, (n_layers, n_options))
        if hard
        else (rng.integers(1, 1000, (n_layers, n_options)).astype(float))
    )
    value[:, 0] = 0.0
    return as_problem(value, cost, np.floor(0.15 * cost.max(axis=2).sum(axis=1)), ("a", "b", "c", "d"))


FAMILIES: dict[str, Callable[..., AllocationProblem]] = {"transformer": transformer_problem, "random": random_problem}


def best_of(repeats: int, work: Callable[[], Any]) -> tuple[float, Any]:
    """Least wall-clock seconds of several runs, and the last result."""
    seconds, result = math.inf, None
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        seconds = min(seconds, time.perf_counter() - start)
    return seconds, result


class Incumbents(cp_model.CpSolverSolutionCallback):
    """When CP-SAT found what."""

    def __init__(self) -> None:
        super().__init__()
        self.start = time.perf_counter()
        self.history: list[tuple[float, float]] = []

    def on_solution_callback(self) -> None:
        self.history.append((time.perf_counter() - self.start, self.objective_value))


def run_cp_sat(problem: AllocationProblem, limit: float, workers: int, target: float) -> dict[str, Any]:
    """CP-SAT on the whole problem, values and costs rounded to integers as one would do by hand."""
    model = cp_model.CpModel()
    variables = [model.new_bool_var("") for _ in problem.value]
    for begin, end in zip(problem.offset[:-1], problem.offset[1:], strict=True):
        model.add_exactly_one(variables[begin:end])
    for row, capacity in zip(problem.cost__ro, problem.capacity, strict=True):
        scale = INTEGER_SUM / capacity
        costs = np.ceil(row * scale).astype(np.int64).tolist()
        model.add(cp_model.LinearExpr.weighted_sum(variables, costs) <= math.floor(capacity * scale))
    scale = INTEGER_SUM / float(np.maximum.reduceat(problem.value, problem.offset[:-1]).sum())
    values = np.round(problem.value * scale).astype(np.int64).tolist()
    model.maximize(cp_model.LinearExpr.weighted_sum(variables, values))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = limit
    solver.parameters.num_workers = workers
    solver.parameters.relative_gap_limit = 1e-6  # as for the others
    incumbents = Incumbents()
    start = time.perf_counter()
    status = solver.solve(model, incumbents)
    seconds = time.perf_counter() - start
    reached = next((at for at, value in incumbents.history if value / scale >= target * (1.0 - 1e-9)), None)
    found = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    return {
        "seconds": seconds,
        "value": solver.objective_value / scale if found else None,
        "bound": solver.best_objective_bound / scale if found else None,
        "proved": status == cp_model.OPTIMAL,
        "seconds_to_reach_first": reached,
    }


def run_highs(problem: AllocationProblem, limit: float, tolerance: float) -> dict[str, Any]:
    """HiGHS on the whole problem."""
    n_options = len(problem.value)
    group = np.repeat(np.arange(len(problem.layers)), np.diff(problem.offset))
    one_each = csr_matrix((np.ones(n_options), (group, np.arange(n_options))))
    start = time.perf_counter()
    result = milp(
        -problem.value,
        constraints=[
            LinearConstraint(csr_matrix(problem.cost__ro / problem.capacity[:, None]), ub=1.0),
            LinearConstraint(one_each, lb=1.0, ub=1.0),
        ],
        bounds=Bounds(0, 1),
        integrality=np.ones(n_options),
        options={"time_limit": limit, "mip_rel_gap": tolerance},
    )
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "value": None if result.x is None else -float(result.fun),
        "bound": None if result.mip_dual_bound is None else -float(result.mip_dual_bound),
        "proved": result.status == 0,
    }


def run_instance(family: str, n_layers: int, hard: bool, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """All solvers on one instance."""
    problem = FAMILIES[family](n_layers, hard=hard, seed=seed)
    repeats = 3 if n_layers <= 1000 else 1
    first_s, first = best_of(repeats, lambda: solve(problem, refine=False, threads=options.threads))
    entry: dict[str, Any] = {
        "instance": f"{family} {n_layers} {'hard' if hard else 'easy'} #{seed}",
        "first": {"seconds": first_s, "value": first.value, "bound": first.upper_bound, "gap": first.gap},
    }
    full_s, full = best_of(1, lambda: solve(problem, threads=options.threads))
    entry["full"] = {
        "seconds": full_s,
        "value": full.value,
        "bound": full.upper_bound,
        "gap": full.gap,
        "proved": full.status == "optimal",
        "solver": full.solver,
    }
    if n_layers <= options.others_up_to:
        entry["cp-sat"] = run_cp_sat(problem, options.limit, options.threads, first.value)
        entry["highs"] = run_highs(problem, options.limit, 1e-6)
    bounds = [entry[name]["bound"] for name in ("first", "full", "cp-sat", "highs") if name in entry]
    best_bound = min(bound for bound in bounds if bound is not None)
    for name in ("first", "full", "cp-sat", "highs"):
        if name in entry and entry[name]["value"] is not None:
            entry[name]["gap_to_best_bound"] = max(0.0, best_bound - entry[name]["value"]) / abs(best_bound)
    return entry


def line(entry: dict[str, Any]) -> str:
    """One row of the table."""
    cells = [f"{entry['instance']:28s}"]
    for name in ("first", "full", "cp-sat", "highs"):
        if name not in entry:
            cells.append(f"{'–':>26s}")
            continue
        run = entry[name]
        gap = f"{100 * run['gap_to_best_bound']:.5f} %" if "gap_to_best_bound" in run else "nothing"
        proved = " ✓" if run.get("proved") else "  "
        cells.append(f"{1e3 * run['seconds']:10.1f} ms {gap:>11s}{proved}")
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[72, 224])
    parser.add_argument("--families", nargs="+", choices=sorted(FAMILIES), default=sorted(FAMILIES))
    parser.add_argument("--seeds", type=int, default=1, help="instances of each kind")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds for CP-SAT alone and for HiGHS alone")
    parser.add_argument("--others-up-to", type=int, default=1000, help="most layers that CP-SAT and HiGHS alone try")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the results")
    options = parser.parse_args()
    print(f"{'instance':28s} | {'first':>26s} | {'full':>26s} | {'CP-SAT alone':>26s} | {'HiGHS alone':>26s}")
    entries = []
    for family in options.families:
        for n_layers in options.layers:
            for hard in (False, True):
                for seed in range(options.seeds):
                    entries.append(run_instance(family, n_layers, hard, seed, options))
                    print(line(entries[-1]), flush=True)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        machine = {
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "isa": isa(),
            "threads": options.threads,
            "ortools": ortools.__version__,
            "scipy": scipy.__version__,
        }
        options.output.write_text(json.dumps({"machine": machine, "limit_s": options.limit, "runs": entries}, indent=1))


if __name__ == "__main__":
    main()
