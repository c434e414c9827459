"""The calibration study of one or more tasks: single-layer gains, stability over calibration samples, and cost.

    python benchmarks/evaluation/calibrate.py digits-5-9

Appends to ``results/<task>.jsonl`` what is missing there, and prints the rank correlations.
"""

from __future__ import annotations

import math
import sys
import time

import torch
from candidates import CANDIDATES
from run import RESULTS
from scipy.stats import spearmanr
from single_layers import predicted_gains, rank_correlation, single_layer_gains, single_layer_records
from tasks import TASKS

from layerlens.config.study import utility_arms
from layerlens.evaluation.results import ResultsFile
from layerlens.evaluation.stacks import Arm
from layerlens.evaluation.study import UtilityFunction, allocate, utilities
from layerlens.evaluation.study_task import StudyTask, lora_spec, profile
from layerlens.evaluation.training import train
from layerlens.rank_rules.published import equal_ranks
from layerlens.registry import UTILITY_MODELS

PREDICTORS = ("adam", "nuclear", "even_ranks", "even_ranks_eighth")
"""Of the candidates, those that rank layers in a way of their own."""
MODELS: dict[str, str | UtilityFunction] = {
    **{name: model for name, model in utility_arms().items() if model not in ("auto", "uniform")},
    **{name: CANDIDATES[name] for name in PREDICTORS},
}
DEFAULT = "tempered_energy"
"""What "auto" takes at the tight budget."""
SEEDS = (0, 1)
"""Seeds of the single-layer runs: two, so that the reliability of the measurement itself is known."""
SAMPLE_COUNTS = (16, 32, 64, 128)
COST_ROUNDS = 3
"""Timings of each kind, one after the other; the least counts, since this machine has other work."""


def singles(task: StudyTask, results: ResultsFile) -> dict[str, float]:
    """Measured gain of every layer alone, at the better of the middle rates of the task's grid."""
    layers = [layer.name for layer in lora_spec(task).layers]
    rates = tuple(sorted(task.learning_rates)[2:4])
    for seed in SEEDS:
        if not results.select(kind="single", seed=seed):
            results.append(single_layer_records(task, layers, steps=task.steps // 2, seed=seed, rates=rates))
    return single_layer_gains(results.select(kind="single"))


def correlations(task: StudyTask, results: ResultsFile) -> None:
    """Spearman of every utility model with the measured gains, and with itself on other samples."""
    measured = singles(task, results)
    half = min(256, len(task.train) // 2)
    first, second = (profile(task, torch.arange(start, start + half)).statistics for start in (0, half))
    # Fewer samples, none of them among the first half's, which they are compared with.
    smaller = {n: profile(task, torch.arange(half, half + n)).statistics for n in SAMPLE_COUNTS if n < half}
    for name, model in MODELS.items():
        if results.select(kind="calibration", model=name, fewer_are_others=True):
            continue
        of = [predicted_gains(utilities(task, found, model)) for found in (first, second, *smaller.values())]
        predicted = rank_correlation(of[0], measured)
        stability = rank_correlation(of[0], of[1])
        by_count = {n: _spearman(of[0], found) for n, found in zip(smaller, of[2:], strict=True)}
        results.append([
            {"kind": "calibration", "task": task.name, "model": name, "spearman": predicted, "stability": stability,
             "samples": half, "against_fewer": by_count, "fewer_are_others": True}
        ])  # fmt: skip


def _spearman(first: dict[str, float], second: dict[str, float]) -> float:
    names = sorted(first)
    return float(spearmanr([first[name] for name in names], [second[name] for name in names]).statistic)


def cost(task: StudyTask, results: ResultsFile) -> None:
    """Processor time of profiling for the default utility on so many samples, of solving, and of one fine-tune."""
    if results.select(kind="cost", model=DEFAULT):
        return
    layers = lora_spec(task).layers
    budget = sum(layer.n_in + layer.n_out for layer in layers)
    counts = (*SAMPLE_COUNTS, 256)
    profile_s, solve_s, fine_tune_s = dict.fromkeys(counts, math.inf), math.inf, math.inf
    for _ in range(COST_ROUNDS):
        for n in counts:
            started = time.process_time()
            statistics = profile(task, torch.arange(n), UTILITY_MODELS[DEFAULT].needs).statistics
            profile_s[n] = min(profile_s[n], time.process_time() - started)
        started = time.process_time()
        allocate(task, statistics, utilities(task, statistics, DEFAULT), budget)
        solve_s = min(solve_s, time.process_time() - started)
        run = train(task, [Arm(equal_ranks(layers, budget, {}, 0), 0, 1e-3)], evaluate_test=False, measure=False)[0]
        fine_tune_s = min(fine_tune_s, run.cpu_s)
    results.append([
        {"kind": "cost", "task": task.name, "model": DEFAULT, "profile_s": profile_s, "solve_s": solve_s,
         "fine_tune_s": fine_tune_s, "fine_tune_samples": task.steps * task.batch_size}
    ])  # fmt: skip


def main() -> None:
    """Every task that was named."""
    torch.set_num_threads(1)
    for name in sys.argv[1:] or TASKS:
        task, results = TASKS[name](), ResultsFile.open(RESULTS / f"{name}.jsonl")
        correlations(task, results)
        cost(task, results)
        for record in results.select(kind="calibration", fewer_are_others=True):
            found, low, high = record["spearman"]
            print(f"{name:18} {record['model']:14} spearman {found:5.2f} [{low:5.2f}, {high:5.2f}] "
                  f"stability {record['stability'][0]:5.2f} {record['against_fewer']}", flush=True)  # fmt: skip
        print(results.select(kind="cost")[-1], flush=True)


if __name__ == "__main__":
    main()
