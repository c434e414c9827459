"""What a proxy check would choose between some arms and uniform LoRA, and what becomes of the gain.

The product's check (``optimization.proxy_check``) trains complete allocations beside each other for some steps and
takes the one with the smallest held-out loss. Here the arms are trained for a share of the steps, with warm-up and
decay of their own, at the rate that each arm has; validation samples judge. A whole fine-tune of each is a share of 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from layerlens.config.optimization import UNIFORM_LORA
from layerlens.evaluation.results import (
    UNIFORM,
    ResultsFile,
    arm_results,
    baseline_loss,
    chosen_rate,
    normalised_gain,
    study_seeds,
)
from layerlens.evaluation.stacks import Arm
from layerlens.evaluation.study_task import StudyTask
from layerlens.evaluation.training import train
from layerlens.jobs.proxy_check import with_margin


def run_check(task: StudyTask, results: ResultsFile, key: str, ranks: Mapping[str, int], share: float) -> None:
    """The short runs of the allocation that the results lack, one for each seed, at the rate that its sweep chose."""
    rate = chosen_rate(results.select(kind="run", key=key), task.sweep_seeds)
    done = {record["seed"] for record in results.select(kind="check", key=key, share=share, lr=rate)}
    missing = [seed for seed in task.seeds if seed not in done]
    if not missing:
        return
    steps = round(share * task.steps)
    runs = train(task, [Arm(ranks, seed, rate) for seed in missing], steps=steps, evaluate_test=False)
    results.append(
        {"kind": "check", "task": task.name, "key": key, "share": share, "steps": steps, "lr": rate, "seed": seed,
         "validation_loss": float(f"{run.validation_loss:.6g}")}
        for seed, run in zip(missing, runs, strict=True)
    )  # fmt: skip


def checked_gain(
    results: ResultsFile, budget: str, arms: Sequence[str], share: float
) -> tuple[np.ndarray, dict[str, int]] | None:
    """(normalised gain over uniform LoRA [seeds] of what the check takes in each seed, how often it takes each arm).

    It chooses between ``arms`` and uniform LoRA, as the product does (``layerlens.jobs.proxy_check``): uniform LoRA
    has its margin. None where runs are missing.
    """
    found = arm_results(results, budget)
    candidates = (*arms, UNIFORM)
    if not set(candidates) <= found.keys():
        return None
    seeds, _ = study_seeds(results)
    head = results.select(kind="reference", name="head") or results.select(kind="reference", name="frozen")[-1:]
    baseline = float(np.mean([record["validation_loss"] for record in head]))
    drops = []
    for name in candidates:
        key = results.select(kind="arm", budget=budget, arm=name)[-1]["key"]
        kind = {"kind": "run"} if share == 1.0 else {"kind": "check", "share": share}
        records = results.select(key=key, lr=found[name].learning_rate, **kind)
        by_seed = {record["seed"]: record["validation_loss"] for record in records}
        if not set(seeds) <= by_seed.keys():
            return None
        named = UNIFORM_LORA if name == UNIFORM else name
        drops.append([with_margin(named, baseline - by_seed[seed]) for seed in seeds])
    taken = np.argmax(drops, axis=0)
    gains = [normalised_gain(found[name], found[UNIFORM], baseline_loss(results)) for name in candidates]
    return np.choose(taken, gains), {name: int((taken == number).sum()) for number, name in enumerate(candidates)}
