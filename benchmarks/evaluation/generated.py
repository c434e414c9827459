"""The hypernetwork as an ablation: the default's ranks, with A and B made by the built-in generator while they train.

    python benchmarks/evaluation/generated.py digits-5-9

Adds the arms ``<default>_generated`` to ``results/<task>.jsonl``. A generator has no stacked form, so every run is a
model of stock PEFT by itself, with the study's data order, schedule, head and rates.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from arm_costs import with_lora
from run import open_study

from layerlens.evaluation.results import allocation_key
from layerlens.evaluation.stacks import Arm
from layerlens.evaluation.study_task import StudyTask
from layerlens.evaluation.training import HEAD_LEARNING_RATE, Run, data_order, measure_arms, run_allocation
from layerlens.tuning.baselines.plain import GENERATOR
from layerlens.tuning.generators import attach_generator
from layerlens.tuning.short_training import run_steps

ARMS = (("tight", "tempered_energy"), ("loose", "tempered_log"))


def train_generated(task: StudyTask, arms: Sequence[Arm], **_: Any) -> list[Run]:
    """Every arm by itself, its LoRA generated."""
    return [_train_one(task, arm) for arm in arms]


def _train_one(task: StudyTask, arm: Arm) -> Run:
    model = attach_generator(with_lora(task.model, dict(arm.ranks)), GENERATOR, seed=arm.seed).eval()
    generated = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": generated, "lr": arm.learning_rate}]
    for name in task.heads:
        head = list(model.get_submodule(f"base_model.model.{name}").requires_grad_(True).parameters())
        groups.append({"params": head, "lr": HEAD_LEARNING_RATE})
    peaks = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    order = data_order(len(task.train), task.steps * task.batch_size, arm.seed)
    started, cpu_started = time.perf_counter(), time.process_time()

    def loss(step: int) -> torch.Tensor:
        batch = task.train.rows(order[step * task.batch_size : (step + 1) * task.batch_size])
        return task.loss(model(**batch.inputs), batch).sum() / task.label_count(batch.labels).sum()

    def update(share: float) -> None:
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * share
        optimizer.step()
        optimizer.zero_grad()

    run_steps(task.steps, loss, update)
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    tuned = replace(task, model=model)
    (validation,), (test,) = measure_arms(tuned, task.validation, 1), measure_arms(tuned, task.test, 1)
    tokens = task.train.rows(order).labels.numel()
    return Run(validation[0], test[0], validation[1], test[1], wall_s, cpu_s, tokens / wall_s)


def main() -> None:
    """Every task that was named."""
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        study = open_study(name)
        for budget, arm in ARMS:
            ranks = study.ranks(arm, study.budgets[budget])
            key = allocation_key(ranks, "generated")
            if not study.results.select(kind="arm", arm=f"{arm}_generated", budget=budget, key=key):
                study.results.append([
                    {"kind": "arm", "task": name, "budget": budget, "arm": f"{arm}_generated", "key": key,
                     "params": sum(rank * (layer.n_in + layer.n_out) for layer in study.layers
                                   if (rank := ranks.get(layer.name, 0))), "ranks": ranks}
                ])  # fmt: skip
            run_allocation(study.task, study.results, key, ranks, train_arms=train_generated)
            print(name, budget, flush=True)


if __name__ == "__main__":
    main()
