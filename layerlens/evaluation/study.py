"""One task of a study: what every arm chooses at a budget, and its runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import numpy as np
import torch

from layerlens.config import OptimizationConfig
from layerlens.config.study import ADALORA, EVA_INIT, SVD, utility_arms
from layerlens.cost import cost_table
from layerlens.evaluation.results import ResultsFile, allocation_key
from layerlens.evaluation.stacks import AdaLora, Arm, LayerStack
from layerlens.evaluation.study_task import (
    ALL_BUT_KERNEL,
    CALIBRATION_SAMPLES,
    StudyTask,
    eva_inits,
    gradient_svd_inits,
    layer_gradients,
    lora_layers,
    lora_spec,
    profile,
    rule_quantities,
)
from layerlens.evaluation.training import measure_arms, run_allocation, train
from layerlens.methods import enumerate_options
from layerlens.models import LORA, ModelSpec, ModelStatistics, Option, UtilityTable
from layerlens.optimization import build_problem, solve
from layerlens.rank_rules import params_of, rank_cost
from layerlens.rank_rules.adalora import final_ranks, first_rank
from layerlens.registry import RANK_RULES, UTILITY_MODELS
from layerlens.tuning.baselines.measured import FISHER
from layerlens.utility import model_for, needed_statistics, utility_table

UtilityFunction = Callable[[ModelSpec, ModelStatistics, Sequence[Option]], np.ndarray]
WEIGHTS = {"gradient_energy": 0.5, "fisher": 0.5}
"""Of the "weighted" utility model: the configuration's default."""
GRADIENT = "gradient"
KINDS = {ADALORA: "adalora_schedule", EVA_INIT: "eva_init"}
"""What the runs of arms that are more than ranks are kept under; old files have an earlier rule's under "adalora"."""


class Study:
    """The statistics of a task, measured once, and its results.

    Args:
        task: what to train on.
        results: where every run goes, and where finished ones are found again.
        budgets: name -> trainable parameters.
        models: further utility models by arm name.
        arms: those that will be run, for which alone statistics are measured; None: any may be, so all are.
    """

    def __init__(
        self,
        task: StudyTask,
        results: ResultsFile,
        budgets: Mapping[str, int],
        models: Mapping[str, UtilityFunction] | None = None,
        arms: Sequence[str] | None = None,
    ) -> None:
        self.task = task
        self.results = results
        self.budgets = dict(budgets)
        self.models: dict[str, str | UtilityFunction] = {**utility_arms(), **(models or {})}
        self.layers = lora_layers(task)
        self.unit = sum(rank_cost(layer) for layer in self.layers)
        calibration = torch.arange(min(CALIBRATION_SAMPLES, len(task.train)))
        needed, of_layers = (ALL_BUT_KERNEL, True) if arms is None else needed_by(arms)
        self.gradients = layer_gradients(task, task.train.batches(calibration, 16)) if of_layers else {}
        profiled = profile(task, names=needed)
        self.statistics = profiled.statistics
        self.quantities = rule_quantities(self.gradients, self.statistics)
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
        if arm == ADALORA:
            rank = first_rank(self.layers, final_ranks(self.layers, budget))
            return {layer.name: rank for layer in self.layers}
        rule = RANK_RULES["eva" if arm == EVA_INIT else arm]
        return rule.choose(self.layers, budget, self.quantities, 0)

    def run(self, budget: str, arm: str) -> None:
        """The arm's allocation at the named budget, and those of its runs that the results lack."""
        size = self.budgets[budget]
        started = time.perf_counter()
        ranks = self.ranks(arm, size)
        seconds = time.perf_counter() - started
        kind = KINDS.get(arm, "svd" if arm.endswith(SVD) else LORA)
        kind += budget if arm in KINDS else ""
        key = allocation_key(ranks, kind)
        if not self.results.select(kind="arm", arm=arm, budget=budget, key=key):
            n_params = size if arm == ADALORA else params_of(self.layers, ranks)
            self.results.append([
                {"kind": "arm", "task": self.task.name, "budget": budget, "arm": arm, "key": key, "params": n_params,
                 "ranks": ranks, "solve_s": seconds}
            ])  # fmt: skip
        inits = self._inits(arm, ranks)
        stack = AdaLora(size) if arm == ADALORA else LayerStack
        run_allocation(self.task, self.results, key, ranks, inits=inits, layer_stack=stack)

    def _inits(self, arm: str, ranks: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Layer -> A, of the arms that do not draw it."""
        if arm == EVA_INIT:
            return eva_inits(self.gradients, ranks)
        return gradient_svd_inits(self.gradients, ranks) if arm.endswith(SVD) else {}

    def head_alone(self) -> None:
        """The task head trained without any adapter, on every seed; nothing where the head is frozen."""
        if self.task.head is not None and not self.results.select(kind="reference", name="head"):
            runs = train(self.task, [Arm({}, seed, self.task.learning_rates[0]) for seed in self.task.seeds])
            self.results.append(
                {"kind": "reference", "task": self.task.name, "name": "head", "seed": seed, **asdict(run)}
                for seed, run in zip(self.task.seeds, runs, strict=True)
            )


def needed_by(arms: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """The statistics that these arms read, and whether any reads gradients or inputs of layers beside them.

    The gradient is always among them: a pass has to measure something.
    """
    needed, of_layers = {GRADIENT}, False
    for arm in arms:
        model = utility_arms().get(arm.removesuffix(SVD))
        of_layers = of_layers or arm.endswith(SVD) or arm == EVA_INIT
        if model is not None:
            needed |= set(needed_statistics(model, WEIGHTS))
        elif arm != ADALORA:
            needs = RANK_RULES["eva" if arm == EVA_INIT else arm.removesuffix(SVD)].needs
            needed |= {"fisher"} if FISHER in needs else set()
            of_layers = of_layers or bool(set(needs) - {FISHER})
    return tuple(sorted(needed)), of_layers


def utilities(task: StudyTask, statistics: ModelStatistics, model: str | UtilityFunction) -> UtilityTable:
    """Utility of every LoRA option by a registered model or by a function of the same signature."""
    spec = lora_spec(task)
    options = enumerate_options(spec, {LORA: tuple(task.ranks)})
    if isinstance(model, str):
        if model not in UTILITY_MODELS:
            raise KeyError(model)
        return utility_table(model, spec, statistics, options, WEIGHTS)
    return UtilityTable(options, model(spec, statistics, options), getattr(model, "__name__", "function"), "")


def allocate(task: StudyTask, statistics: ModelStatistics, table: UtilityTable, budget: int) -> dict[str, int]:
    """Layer -> rank of the best allocation with at most ``budget`` trainable parameters."""
    config = OptimizationConfig(max_trainable_params=budget, methods=(LORA,), lora_ranks=tuple(task.ranks))
    spec = lora_spec(task)
    problem = build_problem(spec, table, cost_table(spec, statistics, table.options, config), config)
    answer = solve(problem, refine_deterministic_time=2.0)
    chosen = [problem.options[index] for index in answer.choice]
    return {option.layer: option.rank for option in chosen if option.rank}
