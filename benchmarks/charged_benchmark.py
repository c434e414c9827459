"""The solver where costs are paid once: time to a gap of 0.3 %, time to the proof, in processor time of one thread.

    python benchmarks/charged_benchmark.py --layers 72 224 --seeds 4 --output benchmarks/results/solver_charged.json

Instances are those of ``layerlens bench`` (32 options for each layer, costs by a transformer's formulas) with a fifth
resource, the step time; blocks of seven layers that pay for themselves and for two shared inputs; and a depth charge
for every block that the backward pass goes through. ``easy`` budgets are wide, with ``hard`` ones most of the model
stays frozen. Processor time, because a busy machine stretches the clock.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from layerlens.bench.speeds import transformer_problem
from layerlens.models import AllocationProblem, DepthCharge, GroupCharge, SolverEvent
from layerlens.optimization import solve
from layerlens.utils.processor import processor_name

BLOCK, OPTIONS, GOOD_GAP = 7, 32, 0.003
MEMORY, STEP = 2, 4


def charged_problem(n_layers: int, *, hard: bool, seed: int) -> AllocationProblem:
    """``transformer_problem`` with step time, shared inputs, blocks and depth."""
    plain = transformer_problem(n_layers, hard=hard, seed=seed)
    rng = np.random.default_rng([7, seed, n_layers])
    params = plain.cost__ro[0].reshape(-1, OPTIONS)
    step = np.where(params > 0.0, rng.uniform(0.05, 0.2, (n_layers, 1)) + params / 2e7, 0.0)
    stage = np.arange(n_layers) // BLOCK
    kept = plain.cost__ro[MEMORY].reshape(-1, OPTIONS)[:, 1:].min(axis=1)

    def cost(memory_gb: float, step_ms: float = 0.0) -> np.ndarray:
        found = np.zeros(5)
        found[MEMORY], found[STEP] = memory_gb, step_ms
        return found

    def adapting(layers: list[int]) -> tuple[int, ...]:
        return tuple(layer * OPTIONS + option for layer in layers for option in range(1, OPTIONS))

    charges: list[GroupCharge] = []
    for block in range(int(stage.max()) + 1):
        own = list(range(block * BLOCK, min(n_layers, (block + 1) * BLOCK)))
        outer = len(charges)
        block_cost = cost(2.0 * float(kept[own].mean()), float(rng.uniform(0.1, 0.4)))
        charges.append(GroupCharge(f"block {block}", adapting(own), block_cost))
        for shared in (own[:3], own[4:6]):
            if len(shared) > 1:
                shared_cost = cost(float(kept[shared].mean() * rng.uniform(0.8, 1.5)))
                charges.append(GroupCharge(f"input in block {block}", adapting(shared), shared_cost, outer))
    passing = np.zeros((int(stage.max()) + 1, 5))
    passing[:, MEMORY] = kept.mean() * rng.uniform(1.0, 2.0, len(passing))
    passing[:, STEP] = rng.uniform(0.5, 1.0, len(passing))
    depth = DepthCharge(
        stage, tuple(f"block {s}" for s in range(len(passing))), np.cumsum(passing[::-1], axis=0)[::-1].copy()
    )
    capacity = np.append(plain.capacity, 0.0)
    fixed = np.sum([charge.cost__r for charge in charges], axis=0) + passing.sum(axis=0)
    capacity[STEP] = (0.4 if hard else 0.7) * (float(step.max(axis=1).sum()) + fixed[STEP])
    capacity[MEMORY] += (0.3 if hard else 0.5) * fixed[MEMORY]
    return dataclasses.replace(
        plain,
        cost__ro=np.concatenate((plain.cost__ro, step.reshape(1, -1))),
        resources=(*plain.resources, "step_ms"),
        capacity=capacity,
        budget=capacity.copy(),
        base=np.zeros(5),
        charges=tuple(charges),
        depth=depth,
    )


def run(n_layers: int, hard: bool, seed: int) -> dict[str, Any]:
    """One instance."""
    problem = charged_problem(n_layers, hard=hard, seed=seed)
    good: list[float] = []
    start = time.process_time()

    def watch(event: SolverEvent) -> None:
        if event.value is not None and not good and event.upper_bound - event.value <= GOOD_GAP * event.upper_bound:
            good.append(time.process_time() - start)

    answer = solve(problem, log=watch)
    seconds = time.process_time() - start
    lowest = problem.lowest_stage(answer.choice)
    return {
        "instance": f"{n_layers} layers, {'hard' if hard else 'easy'} #{seed}",
        "layers": n_layers,
        "seconds_to_0.3_percent": good[0] if good else None,
        "seconds": seconds,
        "gap": answer.gap,
        "status": answer.status,
        "solver": answer.solver,
        "lowest_block": lowest,
        "charges_paid": len(problem.paid(answer.choice)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[72, 224])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    run(72, False, 99)  # OR-Tools and the kernels are loaded before anything is timed
    runs = []
    for n_layers in options.layers:
        for hard in (False, True):
            for seed in range(options.seeds):
                runs.append(run(n_layers, hard, seed))
                print(runs[-1], flush=True)
    medians = {}
    for n_layers in options.layers:
        own = [each for each in runs if each["layers"] == n_layers]
        to_good = [each["seconds_to_0.3_percent"] or float("inf") for each in own]
        medians[str(n_layers)] = {
            "median_seconds_to_0.3_percent": statistics.median(to_good),
            "median_seconds": statistics.median(each["seconds"] for each in own),
            "proved": f"{sum(each['status'] == 'optimal' for each in own)} of {len(own)}",
        }
    print(json.dumps(medians, indent=1))
    if options.output:
        machine = {"processor": processor_name(), "cores": os.cpu_count(), "threads": 1}
        machine["load"] = os.getloadavg()[0]
        found = {"machine": machine, "clock": "processor time", "medians": medians, "runs": runs}
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
