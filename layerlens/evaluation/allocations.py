"""From measured statistics to an allocation, by the product's own utility models and solver."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from layerlens.config import OptimizationConfig
from layerlens.cost import cost_table
from layerlens.evaluation.study_task import StudyTask
from layerlens.models import LayerSpec, ModelSpec, ModelStatistics, Option, UtilityTable, enumerate_options
from layerlens.optimization import build_problem, solve
from layerlens.profiling.measure import measure
from layerlens.profiling.request import STATISTICS, StatisticsRequest
from layerlens.utility import UTILITY_MODELS, utility_table
from layerlens.utils.progress import silent

UtilityFunction = Callable[[ModelSpec, ModelStatistics, Sequence[Option]], np.ndarray]
CALIBRATION_SAMPLES = 256
ALL_BUT_KERNEL = tuple(name for name in STATISTICS if name != "ntk")
WEIGHTS = {"gradient_energy": 0.5, "fisher": 0.5}
"""Of the "weighted" utility model: the configuration's default."""


@dataclass(frozen=True)
class Profile:
    """Statistics of a task and how long they took, in seconds."""

    statistics: ModelStatistics
    seconds: float


def lora_spec(task: StudyTask) -> ModelSpec:
    """The task's layers with LoRA as their only method."""
    layers: list[LayerSpec] = [
        replace(layer, methods=("lora",)) for layer in task.spec.layers if "lora" in layer.methods
    ]
    return replace(task.spec, layers=layers)


def profile(
    task: StudyTask,
    index: torch.Tensor | None = None,
    names: Sequence[str] = ALL_BUT_KERNEL,
) -> Profile:
    """Measure the task on training samples, the first 256 unless ``index`` says which."""
    index = torch.arange(min(CALIBRATION_SAMPLES, len(task.train))) if index is None else index
    started = time.perf_counter()
    statistics = measure(
        task.model,
        lora_spec(task),
        task.train.batches(index, 16),
        request=StatisticsRequest.of(names),
        sequence_length=1,
        threads=1,
        progress=silent,
        loss=task.loss,
    )
    return Profile(statistics, time.perf_counter() - started)


def utilities(task: StudyTask, statistics: ModelStatistics, model: str | UtilityFunction) -> UtilityTable:
    """Utility of every LoRA option by a registered model or by a function of the same signature."""
    spec = lora_spec(task)
    options = enumerate_options(spec, {"lora": tuple(task.ranks)})
    if isinstance(model, str):
        if model not in UTILITY_MODELS and model != "weighted":
            raise KeyError(model)
        return utility_table(model, spec, statistics, options, WEIGHTS)
    return UtilityTable(options, model(spec, statistics, options), getattr(model, "__name__", "function"), "")


def allocate(task: StudyTask, statistics: ModelStatistics, table: UtilityTable, budget: int) -> dict[str, int]:
    """Layer -> rank of the best allocation with at most ``budget`` trainable parameters."""
    config = OptimizationConfig(max_trainable_params=budget, methods=("lora",), lora_ranks=tuple(task.ranks))
    spec = lora_spec(task)
    problem = build_problem(spec, table, cost_table(spec, statistics, table.options, config), config)
    answer = solve(problem, refine_deterministic_time=2.0)
    chosen = [problem.options[index] for index in answer.choice]
    return {option.layer: option.rank for option in chosen if option.rank}
