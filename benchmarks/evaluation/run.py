"""Runs the study of one or more tasks and goes on where it was interrupted.

    python benchmarks/evaluation/run.py digits-5-9 c-headers --until 02:00

Every run is appended to ``results/<task>.jsonl``. Remove the file to begin again.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import sklearn.datasets  # noqa: F401  before the fork, once for all
import torch
import transformers  # noqa: F401
from candidates import CANDIDATES
from check_runs import run_check
from other_stacks import FullStack
from tasks import MORE_TASKS, TASKS

from layerlens.evaluation.results import UNIFORM, ResultsFile
from layerlens.evaluation.study import Study
from layerlens.evaluation.study_task import lora_layers
from layerlens.evaluation.training import run_allocation
from layerlens.rank_rules import rank_cost

RESULTS = Path(__file__).parent / "results"
STAGES = (
    ("tight", ("uniform", "tempered_log", "tempered_energy", "even_ranks")),
    ("reference", ("head",)),
    ("loose", ("uniform", "tempered_log", "tempered_energy", "even_ranks", "even_ranks_eighth")),
    ("half", ("tempered_log", "tempered_energy", "even_ranks")),
    ("tight", ("gora", "eva", "adalora", "signal", "tempered", "even", "adam")),
    ("check", ("tight", "loose")),
    ("double", ("tempered_log", "even_ranks")),
    ("loose", ("gora", "root_parameters", "eva", "adalora")),
    ("tight", ("uniform_svd", "tempered_log_svd", "whitened", "root_parameters", "even_ranks_eighth")),
    (
        "tight",
        ("nuclear", "mixed", "gradient", "fisher_proportional", "adam_shape", "uniform_qv", "weighted", "random"),
    ),
    ("loose", ("signal", "even", "tempered")),
    ("tight", ("gradient_norm", "signal_log", "eva_init")),
    ("reference", ("full",)),
)
"""What is run, in this order, so that what there is when time runs out is balanced. "check" is the proxy check between
``CHECKED`` and uniform LoRA at these budgets."""
CHECK_SHARES = (0.25, 0.5)
CHECKED = ("tempered_log", "tempered_energy")
FULL_RATE_FACTOR = 0.1
"""Learning rates of full fine-tuning, relative to those of adapters."""


def open_study(name: str) -> Study:
    """The task with its budgets: ``tight`` is what rank 1 on every layer takes."""
    task = {**TASKS, **MORE_TASKS}[name]()
    unit = sum(rank_cost(layer) for layer in lora_layers(task))
    budgets = {"half": unit // 2, "tight": unit, "double": 2 * unit, "loose": 4 * unit}
    return Study(task, ResultsFile.open(RESULTS / f"{name}.jsonl"), budgets, CANDIDATES)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help=f"of {', '.join(TASKS)}")
    parser.add_argument("--arms", help="budget:arm,... instead of all, such as tight:tempered,half:tempered")
    parser.add_argument("--until", help="HH:MM (UTC): begin no further arm after this time")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wanted = [(budget, arm) for budget, arms in STAGES for arm in arms]
    if arguments.arms:
        wanted = [(budget, arm) for budget, _, arm in (text.partition(":") for text in arguments.arms.split(","))]
    end = end_of(arguments.until)
    for name in arguments.tasks:
        # One process for each task, which share what was imported; the last task runs in this one.
        if name == arguments.tasks[-1] or os.fork() == 0:
            _run_task(name, wanted, end)
            return


def end_of(until: str | None) -> datetime | None:
    """The next time that a clock in UTC shows HH:MM; None for none."""
    if not until:
        return None
    now = datetime.now(timezone.utc)
    hour, minute = map(int, until.split(":"))
    end = now.replace(hour=hour, minute=minute, second=0)
    return end + timedelta(days=1) if end < now else end


def _run_task(name: str, wanted: list[tuple[str, str]], end: datetime | None) -> None:
    study = open_study(name)
    for budget, arm in wanted:
        if end is not None and datetime.now(timezone.utc) > end:
            return
        study.results.refresh()
        if budget == "check":
            _check(study, arm)
        elif budget != "reference":
            study.run(budget, arm)
        elif arm == "head":
            study.head_alone()
        else:
            full(study)
        print(f"{datetime.now():%H:%M:%S} {name} {budget} {arm}", flush=True)


def full(study: Study) -> None:
    """Every weight of the layers trained."""
    slow = replace(study.task, learning_rates=[FULL_RATE_FACTOR * rate for rate in study.task.learning_rates])
    everything = {layer.name: 1 for layer in study.layers}
    run_allocation(slow, study.results, "full", everything, layer_stack=FullStack)


def _check(study: Study, budget: str) -> None:
    for arm in (UNIFORM, *CHECKED):
        study.run(budget, arm)
        found = study.results.select(kind="arm", budget=budget, arm=arm)[-1]
        for share in CHECK_SHARES:
            run_check(study.task, study.results, found["key"], found["ranks"], share)


if __name__ == "__main__":
    main()
