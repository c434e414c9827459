"""One task of a study: what every arm chooses at a budget, and its runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace

import torch

from layerlens.evaluation import baselines
from layerlens.evaluation.adalora import AdaLora
from layerlens.evaluation.allocations import (
    CALIBRATION_SAMPLES,
    UtilityFunction,
    allocate,
    lora_spec,
    profile,
    utilities,
)
from layerlens.evaluation.gradients import layer_gradients, lora_layers
from layerlens.evaluation.lora_stack import Arm, LayerStack
from layerlens.evaluation.reference_arms import FullStack
from layerlens.evaluation.results import ResultsFile, allocation_key
from layerlens.evaluation.study_task import StudyTask
from layerlens.evaluation.sweep import run_allocation
from layerlens.evaluation.training import measure_arms, train
from layerlens.utility import model_for

UTILITY_ARMS = {
    name: name
    for name in ("auto", "tempered_log", "tempered", "tempered_energy", "signal", "whitened", "gradient", "weighted")
} | {"even": "uniform"}
"""Arm -> utility model of the product."""
SVD = "_svd"
"""Ending of an arm that has the ranks of the arm before it, and A from the mean gradient (gradient_svd)."""
FULL_RATE_FACTOR = 0.1
"""Learning rates of full fine-tuning, relative to those of adapters."""


class Study:
    """The statistics of a task, measured once, and its results.

    Args:
        task: what to train on.
        results: where every run goes, and where finished ones are found again.
        budgets: name -> trainable parameters.
        models: further utility models by arm name.
    """

    def __init__(
        self,
        task: StudyTask,
        results: ResultsFile,
        budgets: Mapping[str, int],
        models: Mapping[str, UtilityFunction] | None = None,
    ) -> None:
        self.task = task
        self.results = results
        self.budgets = dict(budgets)
        self.models: dict[str, str | UtilityFunction] = {**UTILITY_ARMS, **(models or {})}
        self.layers = lora_layers(task)
        self.unit = sum(baselines.cost(layer) for layer in self.layers)
        calibration = torch.arange(min(CALIBRATION_SAMPLES, len(task.train)))
        self.gradients = layer_gradients(task, task.train.batches(calibration, 16))
        profiled = profile(task)
        self.statistics = profiled.statistics
        known = results.select(kind="reference", name="frozen")
        if not known or known[-1].get("sweep_seeds") != list(task.sweep_seeds):
            (validation, test) = (measure_arms(task, part, 1)[0] for part in (task.validation, task.test))
            results.append([
                {"kind": "reference", "task": task.name, "name": "frozen", "validation_loss": validation[0],
                 "test_loss": test[0], "test_metric": test[1], "total_params": task.spec.total_params,
                 "unit": self.unit, "profile_s": profiled.seconds, "seeds": list(task.seeds),
                 "sweep_seeds": list(task.sweep_seeds)}
            ])  # fmt: skip

    def ranks(self, arm: str, budget: int) -> dict[str, int]:
        """Layer -> rank of what ``arm`` chooses with at most ``budget`` trainable parameters."""
        if arm.endswith(SVD):
            return self.ranks(arm.removesuffix(SVD), budget)
        if arm in self.models:
            model = self.models[arm]
            if isinstance(model, str):
                model = model_for(model, lora_spec(self.task), budget)
            return allocate(self.task, self.statistics, utilities(self.task, self.statistics, model), budget)
        of = {layer.layer: layer.by_method["lora"] for layer in self.statistics.layers}
        choose = {
            "uniform": lambda: baselines.uniform(self.layers, budget),
            "uniform_qv": lambda: baselines.uniform(self.layers, budget, ("query", "value")),
            "eva": lambda: baselines.eva(self.layers, budget, self.gradients),
            "eva_init": lambda: baselines.eva(self.layers, budget, self.gradients),
            "gora": lambda: baselines.gora(self.layers, budget, self.gradients),
            "random": lambda: baselines.random_ranks(self.layers, budget, 0),
            "gradient_norm": lambda: baselines.proportional(
                self.layers, budget, {name: (found.energy or 0.0) ** 0.5 for name, found in of.items()}
            ),
            "fisher_proportional": lambda: baselines.proportional(
                self.layers, budget, {name: found.trace or 0.0 for name, found in of.items()}
            ),
            "adalora": lambda: {layer.name: max(2, round(1.5 * budget / self.unit)) for layer in self.layers},
        }
        return choose[arm]()

    def run(self, budget: str, arm: str) -> None:
        """The arm's allocation at the named budget, and those of its runs that the results lack."""
        size = self.budgets[budget]
        started = time.perf_counter()
        ranks = self.ranks(arm, size)
        seconds = time.perf_counter() - started
        kind = arm + budget if arm in ("adalora", "eva_init") else "svd" if arm.endswith(SVD) else "lora"
        key = allocation_key(ranks, kind)
        if not self.results.select(kind="arm", arm=arm, budget=budget, key=key):
            n_params = size if arm == "adalora" else baselines.n_params(self.layers, ranks)
            self.results.append([
                {"kind": "arm", "task": self.task.name, "budget": budget, "arm": arm, "key": key, "params": n_params,
                 "ranks": ranks, "solve_s": seconds}
            ])  # fmt: skip
        inits = self._inits(arm, ranks)
        stack = AdaLora(size) if arm == "adalora" else LayerStack
        run_allocation(self.task, self.results, key, ranks, inits=inits, layer_stack=stack)

    def _inits(self, arm: str, ranks: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Layer -> A, of the arms that do not draw it."""
        if arm == "eva_init":
            return baselines.eva_inits(self.gradients, ranks)
        return baselines.gradient_svd_inits(self.gradients, ranks) if arm.endswith(SVD) else {}

    def head_alone(self) -> None:
        """The task head trained without any adapter, on every seed; nothing where the head is frozen."""
        if self.task.head is not None and not self.results.select(kind="reference", name="head"):
            runs = train(self.task, [Arm({}, seed, self.task.learning_rates[0]) for seed in self.task.seeds])
            self.results.append(
                {"kind": "reference", "task": self.task.name, "name": "head", "seed": seed, **asdict(run)}
                for seed, run in zip(self.task.seeds, runs, strict=True)
            )

    def full(self) -> None:
        """Every weight of the layers trained."""
        rates = [FULL_RATE_FACTOR * rate for rate in self.task.learning_rates]
        everything = {layer.name: 1 for layer in self.layers}
        slow = replace(self.task, learning_rates=rates)
        run_allocation(slow, self.results, "full", everything, layer_stack=FullStack)
