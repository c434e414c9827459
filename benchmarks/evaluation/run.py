"""Runs the study of one or more tasks and goes on where it was interrupted.

    python benchmarks/evaluation/run.py digits-5-9 c-headers --until 02:00

Every run is appended to ``results/<task>.jsonl``. Remove the file to begin again.
"""

from __future__ import annotations

import argparse
import os
from datetime import datetime, timedelta, timezone
from pathlib import Path

import sklearn.datasets  # noqa: F401  before the fork, once for all
import torch
import transformers  # noqa: F401
from candidates import CANDIDATES
from tasks import MORE_TASKS, TASKS

from layerlens.evaluation.baselines import cost
from layerlens.evaluation.gradients import lora_layers
from layerlens.evaluation.results import ResultsFile
from layerlens.evaluation.study import Study

RESULTS = Path(__file__).parent / "results"
STAGES = (
    ("tight", ("uniform", "signal", "even", "eva")),
    ("half", ("signal",)),
    ("reference", ("head",)),
    ("tight", ("tempered", "adam", "adalora", "gora")),
    ("half", ("tempered", "adam", "even")),
    ("tight", ("whitened", "nuclear", "mixed", "tempered_energy", "adam_shape", "fisher_proportional", "gradient")),
    ("loose", ("uniform", "tempered")),
    ("double", ("tempered",)),
    ("loose", ("signal", "even")),
    ("tight", ("uniform_qv", "weighted", "gradient_norm", "random", "signal_log", "eva_init")),
    ("reference", ("full",)),
    ("loose", ("adam", "adalora", "eva", "gora")),
)
"""What is run, in this order, so that what there is when time runs out is balanced."""


def open_study(name: str) -> Study:
    """The task with its budgets: ``tight`` is what rank 1 on every layer takes."""
    task = {**TASKS, **MORE_TASKS}[name]()
    unit = sum(cost(layer) for layer in lora_layers(task))
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
    end = None
    if arguments.until:
        now = datetime.now(timezone.utc)
        hour, minute = map(int, arguments.until.split(":"))
        end = now.replace(hour=hour, minute=minute, second=0)
        end += timedelta(days=1) if end < now else timedelta()
    for name in arguments.tasks:
        # One process for each task, which share what was imported; the last task runs in this one.
        if name == arguments.tasks[-1] or os.fork() == 0:
            _run_task(name, wanted, end)
            return


def _run_task(name: str, wanted: list[tuple[str, str]], end: datetime | None) -> None:
    study = open_study(name)
    for budget, arm in wanted:
        if end is not None and datetime.now(timezone.utc) > end:
            return
        study.results.refresh()
        if budget != "reference":
            study.run(budget, arm)
        elif arm == "head":
            study.head_alone()
        else:
            study.full()
        print(f"{datetime.now():%H:%M:%S} {name} {budget} {arm}", flush=True)


if __name__ == "__main__":
    main()
