"""Published MMKP instances: our solver in two seconds beside CP-SAT and HiGHS with a minute each.

    python benchmarks/mmkp_benchmark.py DIRECTORY --output benchmarks/results/mmkp.json
    python benchmarks/mmkp_benchmark.py DIRECTORY --only ours --output benchmarks/results/mmkp.json

DIRECTORY holds the files of Khan (I01-I13), Hifi (INST01-INST20) and the irregular INST21-INST30, under those names or
those of a mirror (mmkp_a_07.txt, mmkp_b_01.txt, mmkp_c_21.txt). They are not part of this repository. Results of CP-SAT
and HiGHS that the output file has already, of the same time limit, are kept, so an interrupted run goes on.

``gap`` is to the LP bound; ``best known`` comes from results/mmkp_best_known.json, which says where from.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
from mmkp_instances import read_mmkp
from ortools.sat.python import cp_model
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_matrix, vstack

from layerlens.models import AllocationProblem
from layerlens.optimization import solve

RESULTS = Path(__file__).parent / "results"
SETS = {"I07-I13": r"I(0[789]|1[0-3])", "INST01-20": r"INST(0[1-9]|1\d|20)", "INST21-30": r"INST(2[1-9]|30)"}
MIRROR = {"a": "I", "b": "INST", "c": "INST"}
INTEGER_BITS = 40


def instance_name(path: Path) -> str | None:
    """ "INST01" of INST01, INST1.txt or mmkp_b_01.txt; None for other files."""
    if match := re.fullmatch(r"mmkp_([abc])_(\d\d)", path.stem):
        return f"{MIRROR[match[1]]}{match[2]}"
    if match := re.fullmatch(r"(I|INST)(\d{1,2})", path.stem.upper()):
        return f"{match[1]}{int(match[2]):02d}"
    return None


def run_ours(problem: AllocationProblem, limit: float) -> dict[str, Any]:
    """Ends by counting work, so the answer is the same everywhere; on an idle machine in one to two seconds."""
    start, cpu = time.perf_counter(), time.process_time()
    answer = solve(problem, refine=False, threads=2)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "value": answer.value,
        "bound": answer.upper_bound,
        "proved": answer.status == "optimal",
    }


def run_cp_sat(problem: AllocationProblem, limit: float) -> dict[str, Any]:
    """All cores; whole numbers are given as they are, others scaled."""
    model = cp_model.CpModel()
    chosen = [model.new_bool_var("") for _ in problem.value]
    for begin, end in zip(problem.offset[:-1], problem.offset[1:], strict=True):
        model.add_exactly_one(chosen[begin:end])
    for row, capacity in zip(problem.cost__ro, problem.capacity, strict=True):
        scale = _scale(row, capacity)
        costs = np.ceil(row * scale).astype(np.int64).tolist()
        model.add(cp_model.LinearExpr.weighted_sum(chosen, costs) <= math.floor(capacity * scale))
    scale = _scale(problem.value, float(np.maximum.reduceat(problem.value, problem.offset[:-1]).sum()))
    values = np.round(problem.value * scale).astype(np.int64).tolist()
    model.maximize(cp_model.LinearExpr.weighted_sum(chosen, values))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = limit
    solver.parameters.num_workers = os.cpu_count() or 1
    start = time.perf_counter()
    status = solver.solve(model)
    found = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    return {
        "seconds": time.perf_counter() - start,
        "value": solver.objective_value / scale if found else None,
        "bound": solver.best_objective_bound / scale if found else None,
        "proved": status == cp_model.OPTIMAL,
    }


def _scale(row: np.ndarray, largest: float) -> float:
    return 1.0 if np.array_equal(row, np.floor(row)) else 2.0**INTEGER_BITS / largest


def constraints(problem: AllocationProblem) -> tuple[csr_matrix, csr_matrix]:
    """Budgets and "one of each group" as sparse matrices."""
    n_options = len(problem.value)
    group = np.repeat(np.arange(len(problem.layers)), np.diff(problem.offset))
    return csr_matrix(problem.cost__ro), csr_matrix((np.ones(n_options), (group, np.arange(n_options))))


def run_highs(problem: AllocationProblem, limit: float) -> dict[str, Any]:
    costs, one_each = constraints(problem)
    upper = np.concatenate((problem.capacity, np.ones(one_each.shape[0])))
    lower = np.concatenate((np.full(len(problem.capacity), -np.inf), np.ones(one_each.shape[0])))
    start = time.perf_counter()
    result = milp(
        -problem.value,
        constraints=LinearConstraint(vstack([costs, one_each]), lower, upper),
        bounds=Bounds(0, 1),
        integrality=np.ones(len(problem.value)),
        options={"time_limit": limit, "mip_rel_gap": 0.0},
    )
    return {
        "seconds": time.perf_counter() - start,
        "value": None if result.x is None else -float(result.fun),
        "bound": None if result.mip_dual_bound is None else -float(result.mip_dual_bound),
        "proved": result.status == 0,
    }


def lp_bound(problem: AllocationProblem) -> float:
    costs, one_each = constraints(problem)
    ones = np.ones(one_each.shape[0])
    result = linprog(-problem.value, costs, problem.capacity, one_each, ones, bounds=(0, None), method="highs")
    return -float(result.fun)


RUNS = {"ours": run_ours, "cp-sat": run_cp_sat, "highs": run_highs}


def summary(entries: dict[str, dict[str, Any]]) -> list[str]:
    """For each set: on how many instances we are at least as good as each peer, and the mean gap to the LP bound."""
    lines = []
    for title, pattern in SETS.items():
        rows = [entry for name, entry in sorted(entries.items()) if re.fullmatch(pattern, name) and "ours" in entry]
        if not rows:
            continue
        parts = [f"{title}: mean gap to the LP bound {100 * np.mean([gap(row, 'ours') for row in rows]):.3f} %"]
        for peer in ("cp-sat", "highs", "best known"):
            pairs = [(row["ours"]["value"], value_of(row, peer)) for row in rows if peer in row]
            if pairs:
                good = sum(other is None or ours >= other - 1e-6 for ours, other in pairs)
                parts.append(f"at least as good as {peer} on {good} of {len(pairs)}")
        lines.append("; ".join(parts))
    return lines


def value_of(entry: dict[str, Any], name: str) -> float | None:
    found = entry[name]
    return found["value"] if isinstance(found, dict) else found


def gap(entry: dict[str, Any], name: str) -> float:
    return 1.0 - entry[name]["value"] / entry["lp"] if entry[name]["value"] is not None else math.nan


def line(name: str, entry: dict[str, Any]) -> str:
    cells = [f"{name:7s} {entry['size']:>11s} {entry['lp']:12.2f}"]
    for solver in RUNS:
        run = entry.get(solver)
        if run is None or run["value"] is None:
            cells.append(f"{'–':>27s}")
        else:
            mark = "✓" if run["proved"] else " "
            cells.append(f"{run['value']:10.1f} {100 * gap(entry, solver):6.3f} % {run['seconds']:5.1f} s{mark}")
    cells.append(f"{entry.get('best known', math.nan):10.1f}")
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", nargs="+", choices=sorted(RUNS), default=list(RUNS), help="solvers to run anew")
    parser.add_argument("--instances", default=".*", help="regular expression for their names")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for each of CP-SAT and HiGHS")
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the results")
    options = parser.parse_args()
    best_known = json.loads((RESULTS / "mmkp_best_known.json").read_text(encoding="utf-8"))["values"]
    stored = json.loads(options.output.read_text()) if options.output and options.output.exists() else {}
    entries: dict[str, dict[str, Any]] = stored.get("runs", {})
    paths = {name: path for path in sorted(options.directory.rglob("*")) if (name := instance_name(path))}
    print(
        f"{'':7s} {'n x m':>11s} {'LP bound':>12s} | " + " | ".join(f"{name:>27s}" for name in RUNS) + " | best known"
    )
    for name, path in sorted(paths.items()):
        if not re.fullmatch(options.instances, name):
            continue
        problem = read_mmkp(path)
        entry = entries.setdefault(name, {"size": f"{len(problem.layers)} x {len(problem.resources)}"})
        entry.setdefault("lp", lp_bound(problem))
        if name in best_known:
            entry["best known"] = best_known[name]
        for solver in options.only:
            if solver == "ours" or entry.get(solver, {}).get("limit_s") != options.limit:
                entry[solver] = {**RUNS[solver](problem, options.limit), "limit_s": options.limit}
        print(line(name, entry), flush=True)
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps({**stored, "runs": entries}, indent=1) + "\n", encoding="utf-8")
    print("\n".join(summary(entries)))


if __name__ == "__main__":
    main()
