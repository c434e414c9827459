"""One task of a study: what every arm chooses at a budget, and its runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerlens.config import LatencyProfile, OptimizationConfig
from layerlens.config.optimization import MARGIN
from layerlens.config.study import ADALORA, EVA_INIT, utility_arms, without_svd
from layerlens.config.study_arms import CheapestArm, LayersArm, ManifestArm, WrittenArm, written_arm
from layerlens.cost import cost_table
from layerlens.evaluation.arms import (
    Sets,
    layers_of,
    manifest_ranks,
    needs_a_step,
    profile_of,
    ranks_on_layers,
    with_recorded_step,
)
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
from layerlens.jobs.solve import OF_SETS
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
        base_dir: where the paths of manifests begin.
        device: that the costs of the cheapest choices are for.
        margin: that ``cheapest`` may lose where the arm gives no share.

    Raises:
        ConfigurationError: an arm names blocks or layers that the model has not.
    """

    def __init__(
        self,
        task: StudyTask,
        results: ResultsFile,
        budgets: Mapping[str, int],
        models: Mapping[str, UtilityFunction] | None = None,
        arms: Sequence[str] | None = None,
        *,
        base_dir: Path = Path(),
        device: LatencyProfile | None = None,
        margin: float = MARGIN,
    ) -> None:
        self.task = task
        self.base_dir = base_dir
        self.profile = profile_of(task, device)
        self.margin = margin
        self.results = results
        self.budgets = dict(budgets)
        self.models: dict[str, str | UtilityFunction] = {**utility_arms(), **(models or {})}
        self.layers = lora_layers(task)
        self.unit = sum(rank_cost(layer) for layer in self.layers)
        for arm in arms or ():
            self._check(arm)
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
        return self._choice(arm, budget)[0]

    def _written(self, arm: str) -> WrittenArm | None:
        return None if arm in self.models else written_arm(arm)

    def _check(self, arm: str) -> None:
        """Refuse an arm that this model cannot have before anything is measured or trained."""
        written = self._written(without_svd(arm))
        if isinstance(written, LayersArm):
            layers_of(written, self.task)
        elif isinstance(written, ManifestArm):
            manifest_ranks(written, self.task, self.base_dir)

    def _choice(self, arm: str, budget: int) -> tuple[dict[str, int], dict[str, Any]]:
        """(layer -> rank, what else is known of the choice)."""
        if arm != without_svd(arm):
            return self._choice(without_svd(arm), budget)
        written = self._written(arm)
        if isinstance(written, LayersArm):
            return ranks_on_layers(written, self.task, budget), {}
        if isinstance(written, CheapestArm):
            statistics = self.with_step if needs_a_step(written) else self.statistics
            sets = Sets.of(self.task, statistics, budget, profile=self.profile, arm=written, margin=self.margin)
            ranks, saving = sets.cheapest(self.task)
            return ranks, {"saving": saving}
        if written is not None:
            return manifest_ranks(written, self.task, self.base_dir), {}
        return self._named(arm, budget), {}

    @cached_property
    def with_step(self) -> ModelStatistics:
        """The statistics with a recorded step of training."""
        return with_recorded_step(self.task, self.statistics, self.profile)

    def _named(self, arm: str, budget: int) -> dict[str, int]:
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
        ranks, more = self._choice(arm, size)
        seconds = time.perf_counter() - started
        kind = KINDS.get(arm, "svd" if arm != without_svd(arm) else LORA)
        kind += budget if arm in KINDS else ""
        key = allocation_key(ranks, kind)
        if not self.results.select(kind="arm", arm=arm, budget=budget, key=key):
            n_params = size if arm == ADALORA else params_of(self.layers, ranks)
            self.results.append([
                {"kind": "arm", "task": self.task.name, "budget": budget, "arm": arm, "key": key, "params": n_params,
                 "ranks": ranks, "solve_s": seconds, **more}
            ])  # fmt: skip
        inits = self._inits(arm, ranks)
        stack = AdaLora(size) if arm == ADALORA else LayerStack
        run_allocation(self.task, self.results, key, ranks, inits=inits, layer_stack=stack)

    def _inits(self, arm: str, ranks: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Layer -> A, of the arms that do not draw it."""
        if arm == EVA_INIT:
            return eva_inits(self.gradients, ranks)
        return gradient_svd_inits(self.gradients, ranks) if arm != without_svd(arm) else {}

    def within_budgets(self, arms: Sequence[str], warn: Callable[[str], None]) -> list[tuple[str, str]]:
        """(budget, arm) of all that is to be run: a manifest is left out where it has more parameters."""
        wanted = []
        for budget, size in self.budgets.items():
            for arm in arms:
                written = self._written(without_svd(arm))
                if isinstance(written, ManifestArm):
                    n_params = params_of(self.layers, manifest_ranks(written, self.task, self.base_dir))
                    if n_params > size:
                        warn(
                            f"study.arms: {arm} has {n_params:,} trainable parameters, more than the budget of "
                            f"{size:,}, so it is left out there"
                        )
                        continue
                wanted.append((budget, arm))
        return wanted

    def head_alone(self) -> None:
        """The task head trained without any adapter, on every seed; nothing where the head is frozen."""
        if self.task.heads and not self.results.select(kind="reference", name="head"):
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
        base = without_svd(arm)
        model = utility_arms().get(base)
        of_layers = of_layers or arm != base or arm == EVA_INIT
        written = None if model is not None else written_arm(base)
        if isinstance(written, CheapestArm):
            needed |= set(needed_statistics(OF_SETS, WEIGHTS))
        elif written is not None:
            continue
        elif model is not None:
            needed |= set(needed_statistics(model, WEIGHTS))
        elif arm != ADALORA:
            needs = RANK_RULES["eva" if arm == EVA_INIT else base].needs
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
