"""One allocation's runs: learning rates on the sweep's seeds, then every seed at the rate that validation chose."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from layerlens.evaluation.lora_stack import Arm, LayerStack
from layerlens.evaluation.results import Record, ResultsFile
from layerlens.evaluation.study_task import StudyTask
from layerlens.evaluation.training import Run, train

MAX_EXTENSIONS = 4
"""Rates that are added beyond an end of the grid, as long as the end is the best."""


def chosen_rate(runs: Sequence[Record], sweep_seeds: Sequence[int] = (0,)) -> float:
    """The learning rate with the least validation loss, averaged over the sweep's seeds; NaN counts as infinite."""
    losses: dict[float, list[float]] = defaultdict(list)
    for run in runs:
        if run["seed"] in sweep_seeds:
            losses[run["lr"]].append(run["validation_loss"])
    means = {rate: sum(found) / len(found) for rate, found in losses.items()}
    return min(means, key=lambda rate: means[rate] if math.isfinite(means[rate]) else math.inf)


def run_allocation(
    task: StudyTask,
    results: ResultsFile,
    key: str,
    ranks: Mapping[str, int],
    *,
    inits: Mapping[str, torch.Tensor] | None = None,
    layer_stack: Callable[[str, Any, Sequence[Arm]], Any] = LayerStack,
    train_arms: Callable[..., list[Run]] = train,
) -> None:
    """Do the runs of the allocation that the results lack, by ``train`` or by ``train_arms``, which is called like it.

    The grid is the task's; while its lowest or highest rate is the best, it is extended by its own factor.
    """
    grid = [_rounded(rate) for rate in sorted(task.learning_rates)]
    factor = grid[1] / grid[0]
    for _ in range(MAX_EXTENSIONS + 1):
        wanted = [(rate, seed) for rate in grid for seed in task.sweep_seeds]
        _run(task, results, key, ranks, wanted, inits or {}, layer_stack, train_arms)
        best = chosen_rate(results.select(kind="run", key=key), task.sweep_seeds)
        if best == grid[0]:
            grid = [_rounded(grid[0] / factor), *grid]
        elif best == grid[-1]:
            grid = [*grid, _rounded(grid[-1] * factor)]
        else:
            break
    _run(task, results, key, ranks, [(best, seed) for seed in task.seeds], inits or {}, layer_stack, train_arms)


def _rounded(value: float) -> float:
    """To four digits, as a file has it."""
    return float(f"{value:.4g}")


def _run(
    task: StudyTask,
    results: ResultsFile,
    key: str,
    ranks: Mapping[str, int],
    wanted: Sequence[tuple[float, int]],
    inits: Mapping[str, torch.Tensor],
    layer_stack: Callable[[str, Any, Sequence[Arm]], Any],
    train_arms: Callable[..., list[Run]],
) -> None:
    done = {(run["lr"], run["seed"]) for run in results.select(kind="run", key=key)}
    missing = [pair for pair in wanted if pair not in done]
    for start in range(0, len(missing), task.arms_at_once):
        group = missing[start : start + task.arms_at_once]
        runs = train_arms(task, [Arm(ranks, seed, rate, inits) for rate, seed in group], layer_stack=layer_stack)
        results.append(
            {"kind": "run", "task": task.name, "key": key, "lr": rate, "seed": seed, "steps": task.steps}
            | {name: float(f"{value:.6g}") for name, value in dataclasses.asdict(run).items()}
            for (rate, seed), run in zip(group, runs, strict=True)
        )
