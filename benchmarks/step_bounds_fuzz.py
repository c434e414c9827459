"""What is proved of memory and step time against every choice of small random steps: what must never happen, counted.

    python benchmarks/step_bounds_fuzz.py --count 4000 --output benchmarks/results/step_bounds.json

The steps are those of tests/cost/random_steps.py: chains of two to four layers, some with causes and checkpoints
that no model has. Each has budgets of memory, of step time, or of both, and a random one of parameters. Every choice's
exact peak and time are computed. Counted: answers above a budget, bounds below the best choice, "optimal" that is not,
and refusals where a choice with a gain keeps the budgets.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "cost"))

from random_steps import all_choices, random_case

from layerlens.config import OptimizationConfig
from layerlens.exceptions import InfeasibleError
from layerlens.jobs.find import find_allocation

# Some hundred terms, each rounded by 2^-53 of their sum; and gap_tolerance.
ROUNDING, TOLERANCE = 1e-12, 1e-6


def judge(seed: int) -> tuple[str, float | None]:
    """(what came out, the gap) of one random step."""
    spec, utilities, table = random_case(seed)
    rng, use, choices = np.random.default_rng([2022, seed]), table.step, all_choices(table)
    assert use is not None
    gb, ms = (np.array([figure(each) for each in choices]) for figure in (use.gb, use.ms))
    params = np.array([table.cost__ro[0, each].sum() for each in choices])
    top = float(utilities.utility.max()) if utilities.utility.max() > 0 else float(np.abs(utilities.utility).max())
    score = np.array([utilities.utility[each].sum() / (top or 1.0) for each in choices])
    limits: dict[str, float] = {}
    if seed % 3 != 1:
        limits["max_vram_gb"] = float(rng.choice(gb) if rng.random() < 0.5 else rng.uniform(gb.min(), gb.max()))
    if seed % 3 != 2:
        limits["max_step_ms"] = float(rng.choice(ms))
    if rng.random() < 0.3:
        limits["max_trainable_params"] = int(rng.integers(1, 60))
    fits = (gb <= limits.get("max_vram_gb", np.inf)) & (ms <= limits.get("max_step_ms", np.inf))
    fits &= params <= limits.get("max_trainable_params", np.inf)
    best = float(score[fits].max(initial=-np.inf))
    try:
        config = OptimizationConfig.model_validate(limits | {"methods": ("lora", "adapter")})
        found = find_allocation(spec, utilities, table, config, seed=0, threads=1)
    except InfeasibleError:
        return ("infeasible" if best <= 0.0 else "refused though something fits"), None
    allocation, entries = found.allocation, found.problem.entries(found.allocation.choice)
    if use.gb(entries) > limits.get("max_vram_gb", np.inf) * (1 + ROUNDING):
        return "budget exceeded", None
    if use.ms(entries) > limits.get("max_step_ms", np.inf) * (1 + ROUNDING):
        return "budget exceeded", None
    if allocation.upper_bound < best - ROUNDING:
        return "bound below the best", None
    is_best = allocation.value >= best - TOLERANCE * abs(allocation.upper_bound) - ROUNDING
    if allocation.status == "optimal":
        return ("proved optimal" if is_best else "falsely optimal"), allocation.gap
    return ("best found, gap stated" if is_best else "best missed, gap stated"), allocation.gap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    start, outcomes, gaps, bad = time.process_time(), collections.Counter[str](), [], []
    for seed in range(options.first, options.first + options.count):
        outcome, gap = judge(seed)
        outcomes[outcome] += 1
        if gap is not None:
            gaps.append(gap)
        if outcome in ("budget exceeded", "bound below the best", "falsely optimal"):
            bad.append(f"{seed}: {outcome}")
    found = {
        "instances": options.count,
        "first_seed": options.first,
        "processor_seconds": round(time.process_time() - start),
        "outcomes": dict(sorted(outcomes.items())),
        "mean_gap": statistics.fmean(gaps),
        "bad": bad,
    }
    print(json.dumps(found, indent=1))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
