"""Runs the study of one or more tasks and goes on where it was interrupted.

    python benchmarks/evaluation/run.py digits-5-9 c-headers --until 02:00

Every run is appended to ``results/<task>.jsonl``. Remove the file to begin again.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import torch
from candidates import CANDIDATES
from tasks import TASKS

from layerlens.evaluation import baselines
from layerlens.evaluation.adalora import AdaLora
from layerlens.evaluation.allocations import allocate, profile, utilities
from layerlens.evaluation.gradients import layer_gradients, lora_layers
from layerlens.evaluation.lora_stack import Arm, LayerStack
from layerlens.evaluation.reference_arms import FullStack
from layerlens.evaluation.results import ResultsFile, allocation_key
from layerlens.evaluation.study_task import StudyTask
from layerlens.evaluation.sweep import SEEDS, run_allocation
from layerlens.evaluation.training import measure_arms, train

RESULTS = Path(__file__).parent / "results"
PRODUCT = ("signal", "whitened", "gradient", "weighted")
STAGES = (
    ("reference", ("head", "full_linear")),
    ("tight", ("uniform", "signal", "adalora", "eva")),
    ("tight", ("even", "tempered", "adam", "gora")),
    ("half", ("signal", "even")),
    ("tight", ("mixed", "nuclear", "adam_shape", "whitened")),
    ("half", ("tempered", "adam", "mixed", "nuclear")),
    ("tight", ("uniform_qv", "gradient", "weighted", "gradient_norm", "fisher", "random")),
    ("loose", ("uniform", "signal", "even", "tempered", "adalora", "eva")),
    ("tight", ("signal_log", "eva_init")),
    ("loose", ("adam", "mixed", "nuclear", "gora")),
)
"""What is run, in this order, so that what there is when time runs out is balanced."""


class Study:
    """One task: its statistics, measured when first needed, and its results."""

    def __init__(self, task: StudyTask) -> None:
        self.task = task
        self.results = ResultsFile.open(RESULTS / f"{task.name}.jsonl")
        self.layers = lora_layers(task)
        self.unit = sum(baselines.cost(layer) for layer in self.layers)
        self.budgets = {"half": self.unit // 2, "tight": self.unit, "loose": 4 * self.unit}
        calibration = torch.arange(min(256, len(task.train)))
        self.gradients = layer_gradients(task, task.train.batches(calibration, 16))
        profiled = profile(task)
        self.statistics, self.profile_s = profiled.statistics, profiled.seconds
        if not self.results.select(kind="reference", name="frozen"):
            (validation, test) = (measure_arms(task, part, 1)[0] for part in (task.validation, task.test))
            self.results.append([
                {"kind": "reference", "task": task.name, "name": "frozen", "validation_loss": validation[0],
                 "test_loss": test[0], "test_metric": test[1], "total_params": task.spec.total_params,
                 "unit": self.unit, "profile_s": self.profile_s}
            ])  # fmt: skip

    def ranks(self, arm: str, budget: int) -> dict[str, int]:
        """What ``arm`` chooses."""
        if arm in PRODUCT or arm in CANDIDATES or arm == "even":
            model = {"even": "uniform"}.get(arm, CANDIDATES.get(arm, arm))
            return allocate(self.task, self.statistics, utilities(self.task, self.statistics, model), budget)
        by_name = self.statistics.by_name()
        if arm in ("fisher", "gradient_norm"):
            of = {layer.name: by_name[layer.name].by_method["lora"] for layer in self.layers}
            score = {name: m.trace if arm == "fisher" else (m.energy or 0.0) ** 0.5 for name, m in of.items()}
            return baselines.proportional(self.layers, budget, score)
        return {
            "uniform": lambda: baselines.uniform(self.layers, budget),
            "uniform_qv": lambda: baselines.uniform(self.layers, budget, ("query", "value")),
            "eva": lambda: baselines.eva(self.layers, budget, self.gradients),
            "eva_init": lambda: baselines.eva(self.layers, budget, self.gradients),
            "gora": lambda: baselines.gora(self.layers, budget, self.gradients),
            "random": lambda: baselines.random_ranks(self.layers, budget, 0),
            "adalora": lambda: {layer.name: max(2, round(1.5 * budget / self.unit)) for layer in self.layers},
        }[arm]()

    def run(self, budget: str, arm: str) -> None:
        """The arm's allocation and its runs."""
        if budget == "reference":
            self._reference(arm)
            return
        size = self.budgets[budget]
        started = time.perf_counter()
        ranks = self.ranks(arm, size)
        seconds = time.perf_counter() - started
        kind = arm + budget if arm in ("adalora", "eva_init") else "lora"
        key = allocation_key(ranks, kind)
        if not self.results.select(kind="arm", arm=arm, budget=budget, key=key):
            n_params = size if arm == "adalora" else baselines.n_params(self.layers, ranks)
            self.results.append([
                {"kind": "arm", "task": self.task.name, "budget": budget, "arm": arm, "key": key, "params": n_params,
                 "ranks": ranks, "solve_s": seconds}
            ])  # fmt: skip
        inits = baselines.eva_inits(self.gradients, ranks) if arm == "eva_init" else None
        stack = AdaLora(size) if arm == "adalora" else LayerStack
        run_allocation(self.task, self.results, key, ranks, inits=inits, layer_stack=stack)

    def _reference(self, name: str) -> None:
        """The head alone, on the seeds; every weight of the adapted layers, with its own learning rate."""
        if name == "full_linear":
            ranks = {layer.name: 1 for layer in self.layers}
            slow = replace(self.task, learning_rates=(1e-4, 2.5e-4, 6.3e-4, 1.6e-3, 4e-3))
            run_allocation(slow, self.results, name, ranks, layer_stack=FullStack)
        elif self.task.head is not None and not self.results.select(kind="reference", name=name):
            runs = train(self.task, [Arm({}, seed, 1e-3) for seed in SEEDS])
            self.results.append(
                {"kind": "reference", "task": self.task.name, "name": name, "seed": seed, **asdict(run)}
                for seed, run in zip(SEEDS, runs, strict=True)
            )


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help=f"of {', '.join(TASKS)}")
    parser.add_argument("--until", help="HH:MM (UTC): begin no further arm after this time")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    end = None
    if arguments.until:
        now = datetime.now(timezone.utc)
        hour, minute = map(int, arguments.until.split(":"))
        end = now.replace(hour=hour, minute=minute, second=0)
        end += timedelta(days=1) if end < now else timedelta()
    studies = [Study(TASKS[name]()) for name in arguments.tasks]
    for budget, arms in STAGES:
        for study in studies:
            for arm in arms:
                if end is not None and datetime.now(timezone.utc) > end:
                    return
                study.run(budget, arm)
                print(f"{datetime.now():%H:%M:%S} {study.task.name} {budget} {arm}", flush=True)


if __name__ == "__main__":
    main()
