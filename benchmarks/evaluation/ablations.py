"""What parts of the product add, on one or more tasks: solver, granularity, methods, calibration by proxies.

    python benchmarks/evaluation/ablations.py digits-5-9 c-headers

Each is an arm beside the default (``tempered_log``), which the tables of ``study.md`` show: ``_blocks`` gives all
layers of a block one rank, ``_mixed`` may take bottleneck adapters too, ``_calibrated`` bends the utilities by the
measured gains of single layers (on validation samples). The initialisation has arms in ``run.py`` (``_svd``).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from other_stacks import Mixed
from run import open_study
from single_layers import RANK

from layerlens.config import OptimizationConfig
from layerlens.cost import cost_table
from layerlens.evaluation.results import allocation_key
from layerlens.evaluation.study import Study
from layerlens.evaluation.study_task import lora_spec
from layerlens.evaluation.training import run_allocation
from layerlens.methods import enumerate_options, trainable_params
from layerlens.models import ModelSpec, Option, ProxyGain, ProxyStudy, SolverEvent, UtilityTable
from layerlens.optimization import build_problem, solve
from layerlens.profiling.measure import measure
from layerlens.profiling.request import StatisticsRequest
from layerlens.registry import UTILITY_MODELS
from layerlens.utility import utility_table
from layerlens.utility.calibration import calibrate
from layerlens.utils.progress import silent

DEFAULT = "tempered_log"
METHODS = ("lora", "adapter")
SIZES = (1, 2, 3, 4, 6, 8, 12, 16)


def choose(
    study: Study, spec: ModelSpec, table: UtilityTable, budget: int, **changes: Any
) -> tuple[dict[str, Option], list[SolverEvent], float]:
    """(layer -> option, the solver's log, bound) under ``budget`` with changes to the configuration."""
    methods = tuple(dict.fromkeys(option.method for option in table.options if option.rank))
    config = OptimizationConfig(max_trainable_params=budget, methods=methods, lora_ranks=SIZES, adapter_sizes=SIZES,
                                **changes)  # fmt: skip
    problem = build_problem(spec, table, cost_table(spec, study.statistics, table.options, config), config)
    events: list[SolverEvent] = []
    answer = solve(problem, refine_deterministic_time=2.0, log=events.append)
    chosen = [table.options[entry] for entry in problem.entries(answer.choice)]
    return {option.layer: option for option in chosen if option.rank}, events, answer.upper_bound


def solver(study: Study, budget: str, table: UtilityTable) -> None:
    """How far the first, guided answer was below the last one, and that below the bound; whether ranks differ."""
    if study.results.select(kind="solver", budget=budget):
        return
    _, events, bound = choose(study, lora_spec(study.task), table, study.budgets[budget])
    values = [event.value for event in events if event.value is not None]
    study.results.append([
        {"kind": "solver", "task": study.task.name, "budget": budget, "model": table.model,
         "greedy_gap": (bound - values[0]) / bound, "gap": (bound - values[-1]) / bound}
    ])  # fmt: skip


def run(study: Study, budget: str, arm: str, chosen: Mapping[str, Option]) -> None:
    """Record the arm and do its runs."""
    layers = {layer.name: layer for layer in study.task.spec.layers}
    adapters = {name: option.rank for name, option in chosen.items() if option.method == "adapter"}
    ranks = {name: option.rank for name, option in chosen.items()}
    key = allocation_key(ranks, f"mixed {sorted(adapters)}" if adapters else "lora")
    params = sum(trainable_params(layers[name], option.method, option.rank) for name, option in chosen.items())
    if not study.results.select(kind="arm", arm=arm, budget=budget, key=key):
        study.results.append([
            {"kind": "arm", "task": study.task.name, "budget": budget, "arm": arm, "key": key, "params": params,
             "ranks": ranks, "adapters": sorted(adapters)}
        ])  # fmt: skip
    run_allocation(study.task, study.results, key, ranks, layer_stack=Mixed(adapters))


def calibrated(study: Study, table: UtilityTable) -> UtilityTable | None:
    """The utilities as loss drops, by the measured gains of single layers on validation samples; None without them."""
    records = [record for record in study.results.select(kind="single") if "validation_gain" in record]
    if not records:
        return None
    by_layer: dict[str, dict[float, list[float]]] = {}
    for record in records:
        by_layer.setdefault(record["layer"], {}).setdefault(record["lr"], []).append(record["validation_gain"])
    best = {layer: max(rates.values(), key=np.mean) for layer, rates in by_layer.items()}
    gains = tuple(
        ProxyGain(Option(layer, "lora", RANK), float(np.mean(found)), float(np.std(found, ddof=1) / len(found) ** 0.5))
        for layer, found in best.items()
    )
    return calibrate(table, ProxyStudy(gains, len(gains), study.task.steps // 2, 0.0, len(study.task.validation), 0.0))


def with_adapters(study: Study) -> tuple[ModelSpec, UtilityTable]:
    """The task's layers with LoRA and adapters on offer, and the default utility of both, on the same samples."""
    layers = [
        replace(layer, methods=tuple(method for method in layer.methods if method in METHODS))
        for layer in study.task.spec.layers
        if "lora" in layer.methods
    ]
    spec = replace(study.task.spec, layers=layers)
    index = torch.arange(min(256, len(study.task.train)))
    statistics = measure(
        study.task.model, spec, study.task.train.batches(index, 16),
        request=StatisticsRequest.of(UTILITY_MODELS[DEFAULT].needs), sequence_length=1, threads=1, progress=silent,
        loss=study.task.loss,
    )  # fmt: skip
    options = enumerate_options(spec, dict.fromkeys(METHODS, SIZES))
    return spec, utility_table(DEFAULT, spec, statistics, options, {})


def main() -> None:
    """Every task that was named."""
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        study = open_study(name)
        spec = lora_spec(study.task)
        options = enumerate_options(spec, {"lora": SIZES})
        table = utility_table(DEFAULT, spec, study.statistics, options, {})
        roles = tuple(dict.fromkeys(layer.role for layer in spec.layers))
        for budget in ("tight", "loose"):
            solver(study, budget, table)
            size = study.budgets[budget]
            chosen, _, _ = choose(study, spec, table, size, constraints={"choose_alike": [roles]})
            run(study, budget, f"{DEFAULT}_blocks", chosen)
            both, mixed = with_adapters(study)
            run(study, budget, f"{DEFAULT}_mixed", choose(study, both, mixed, size)[0])
            bent = calibrated(study, table)
            if bent is not None:
                run(study, budget, f"{DEFAULT}_calibrated", choose(study, spec, bent, size)[0])
            print(name, budget, flush=True)


if __name__ == "__main__":
    main()
