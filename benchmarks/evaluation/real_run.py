"""Runs the study on real models, one round over all tasks after the other, and goes on where it was interrupted.

    python benchmarks/evaluation/real_data.py
    python benchmarks/evaluation/pretrain.py vit
    OMP_NUM_THREADS=1 python benchmarks/evaluation/real_run.py --until 07:00

Every run is appended to ``results/real/<task>.jsonl``; ``real_tables.py`` makes the tables. What there is at any time
is balanced: a round has the same arms on every task, and the number of seeds grows in the last rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import sklearn.datasets  # noqa: F401  it brings its own OpenMP, which must be loaded once
import torch
from arm_costs import costs, with_lora
from real_tasks import DEPTH_ARMS, TASKS
from run import end_of

from layerlens.evaluation import training
from layerlens.evaluation.arms import Sets
from layerlens.evaluation.results import UNIFORM, ResultsFile, chosen_rate
from layerlens.evaluation.study import Study
from layerlens.evaluation.study_task import lora_layers, lora_spec
from layerlens.models import LORA
from layerlens.rank_rules import rank_cost
from layerlens.utility.signal import input_scales

EXTENSIONS = training.MAX_EXTENSIONS
RESULTS = Path(__file__).parent / "results" / "real"
BUDGET, RANK = "rank4", 4
"""As many parameters as rank 4 on every layer."""
LARGE = "gsm8k-smollm2"
"""A step of it takes as long as a dozen of the others: it has few arms and comes after their first pass."""
COSTS = "costs"
ROUNDS = (
    (4, (UNIFORM,)),
    (4, ("half", "cheapest:0.95")),
    (4, ("top", "bottom")),
    (4, ("auto", "values")),
    (4, (COSTS,)),
    (4, ("cheapest:0.85", "most")),
    (3, (LARGE, UNIFORM, "half", "bottom")),
    (4, (COSTS,)),
    (8, (UNIFORM, "half", "cheapest:0.95", "top", "bottom", "values", "auto")),
)
"""(paired seeds, arms) in the order in which they are run, each on every task but ``LARGE``, or on it alone; ``COSTS``
are those of all arms that were run before."""
ARMS = (UNIFORM, "auto", "cheapest:0.95", "cheapest:0.85")


class RealStudy:
    """One task: its study, opened when it is first needed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.task = TASKS[name]()
        unit = sum(rank_cost(layer) for layer in lora_layers(self.task))
        blocks = len({layer.block for layer in lora_layers(self.task)})
        self.depth = DEPTH_ARMS[blocks]
        self.size = RANK * unit
        self.arms = [*ARMS, *self.depth.values()]
        self.results = ResultsFile.open(RESULTS / f"{name}.jsonl")
        self.study = Study(self.task, self.results, {BUDGET: self.size}, arms=self.arms)

    def run(self, arm: str, n_seeds: int) -> None:
        """The arm's runs that are missing, at uniform LoRA's best rate and at the next smaller one.

        The first arms on the first three tasks had the next larger one too, and none of them was best there.
        """
        arm = self.depth.get(arm, arm)
        seeds = self.task.seeds[:n_seeds]
        rates = self.task.learning_rates if arm == UNIFORM else self._around()
        self.study.task = replace(self.task, seeds=seeds, learning_rates=rates)
        training.MAX_EXTENSIONS = EXTENSIONS if arm == UNIFORM else 0
        if arm == UNIFORM:
            self._layers()
            self._head(seeds)
        self.study.run(BUDGET, arm)

    def costs(self) -> None:
        """What the product predicts of every arm that was run, and what its step takes."""
        for arm in dict.fromkeys(record["arm"] for record in self.results.select(kind="arm", budget=BUDGET)):
            self._predict(arm)

    def _around(self) -> tuple[float, ...]:
        """Uniform LoRA's best rate and the next smaller one."""
        best = self._rate(UNIFORM)
        return (best * self.task.learning_rates[0] / self.task.learning_rates[1], best)

    def _rate(self, arm: str) -> float:
        key = self._chosen(arm)["key"]
        return chosen_rate(self.results.select(kind="run", key=key), self.task.sweep_seeds)

    def _chosen(self, arm: str) -> dict[str, Any]:
        return self.results.select(kind="arm", budget=BUDGET, arm=arm)[-1]

    def _head(self, seeds: Sequence[int]) -> None:
        """The head trained alone, for the seeds that lack it."""
        known = {record["seed"] for record in self.results.select(kind="reference", name="head")}
        missing = [seed for seed in seeds if seed not in known]
        if not self.task.heads or not missing:
            return
        before = self.results.select(kind="reference", name="head")
        for record in before:
            self.results.records.remove(record)
        self.study.task = replace(self.study.task, seeds=missing)
        self.study.head_alone()
        self.results.records += before
        self.study.task = replace(self.study.task, seeds=seeds)

    def _layers(self) -> None:
        """What was measured of every layer, which laws of sets are fitted from."""
        if self.results.select(kind="layers"):
            return
        statistics = self.study.statistics
        by_name, layers = statistics.by_name(), lora_layers(self.task)
        scales = input_scales(lora_spec(self.task), statistics)
        found = {}
        for layer in layers:
            measured = by_name[layer.name].by_method[LORA]
            found[layer.name] = {
                "energy": float(f"{(measured.energy or 0.0) * scales[layer.name, LORA]:.6g}"),
                "block": layer.block, "role": layer.role, "cost": rank_cost(layer),
            }  # fmt: skip
        self.results.append([{"kind": "layers", "task": self.name, "layers": found}])

    def _predict(self, arm: str) -> None:
        """What the product predicts of the arm's allocation, and what its step takes."""
        chosen = self._chosen(arm)
        if not self.results.select(kind="predicted", key=chosen["key"]):
            ranks = sorted(set(chosen["ranks"].values()))
            sets = Sets.of(self.task, self.study.with_step, self.size, profile=self.study.profile, ranks=ranks)
            found = {name: float(f"{value:.5g}") for name, value in sets.predicted(chosen["ranks"]).items()}
            self.results.append([{"kind": "predicted", "task": self.name, "key": chosen["key"], **found}])
        if not self.results.select(kind="arm_cost", key=chosen["key"]):
            found = costs(self.task, chosen["ranks"]) | {"saved_mb": 1e-6 * saved_bytes(self.task, chosen["ranks"])}
            self.results.append([
                {"kind": "arm_cost", "task": self.name, "key": chosen["key"],
                 **{name: float(f"{value:.5g}") for name, value in found.items()}}
            ])  # fmt: skip


def saved_bytes(task: Any, ranks: dict[str, int]) -> int:
    """Bytes of the activations that a training step keeps for its backward pass: saved tensors that are no weights."""
    model = with_lora(task.model, ranks)
    batch = task.train.rows(torch.arange(task.batch_size))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        task.loss(model(**batch.inputs), batch).sum()
    return sum(kept.values())


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help=f"of {', '.join(TASKS)}")
    parser.add_argument("--until", help="HH:MM (UTC): begin no further arm after this time")
    parser.add_argument("--costs", action="store_true", help="only the costs of the arms that were run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    end = end_of(arguments.until)
    studies: dict[str, RealStudy] = {}
    for n_seeds, arms in ((4, (COSTS,)),) if arguments.costs else ROUNDS:
        of_round = [LARGE] if LARGE in arms else [name for name in TASKS if name != LARGE or COSTS in arms]
        for name in of_round:
            for arm in arms:
                if name not in arguments.tasks or arm == LARGE:
                    continue
                if end is not None and datetime.now(timezone.utc) > end:
                    return
                if name not in studies:
                    studies[name] = RealStudy(name)
                started = time.perf_counter()
                if arm == COSTS:
                    studies[name].costs()
                else:
                    studies[name].run(arm, n_seeds)
                seconds = time.perf_counter() - started
                print(f"{datetime.now():%H:%M:%S} {name} {arm} {n_seeds} seeds {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
