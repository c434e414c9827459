"""What a choice is worth in time and memory: beside uniform LoRA of as many parameters, by the same predictions."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from layerlens.models import LORA, NONE, RESOURCES, CostTable
from layerlens.utils.order import raised_evenly

PARAMS = RESOURCES.index("trainable_params")


def lora_of_rank(costs: CostTable, rank: int, layers: frozenset[str] | None = None) -> np.ndarray:
    """Entries of LoRA of the largest rank up to ``rank`` on every layer that has one, or on these ``layers`` alone."""
    found: dict[str, int] = {}
    for entry, option in enumerate(costs.options):
        if option.method == LORA and option.rank <= rank and (layers is None or option.layer in layers):
            found[option.layer] = entry  # ranks ascend
    return np.array(sorted(found.values()), dtype=np.int64)


def uniform_entries(costs: CostTable, most_params: float) -> np.ndarray:
    """Entries of uniform LoRA with at most so many parameters: the largest equal rank, and what is left spread over the
    depth; empty where there is no LoRA.
    """
    ladders: dict[str, list[int]] = defaultdict(list)
    for entry, option in enumerate(costs.options):
        if option.method in (NONE, LORA):
            ladders[option.layer].append(entry)
    rungs = [sorted(ladder, key=lambda entry: costs.options[entry].rank) for ladder in ladders.values()]
    rungs = [ladder for ladder in rungs if len(ladder) > 1]
    ranks = sorted({costs.options[entry].rank for ladder in rungs for entry in ladder})
    levels = [
        [max(0, sum(costs.options[entry].rank <= rank for entry in ladder) - 1) for ladder in rungs] for rank in ranks
    ]

    def entries(level: list[int]) -> np.ndarray:
        return np.array([ladder[step] for ladder, step in zip(rungs, level, strict=True)], dtype=np.int64)

    found = raised_evenly(levels, lambda level: costs.cost__ro[PARAMS, entries(list(level))].sum() <= most_params)
    if found is None:
        return np.zeros(0, dtype=np.int64)
    return np.array([entry for entry in entries(found) if costs.options[entry].method == LORA], dtype=np.int64)


def beside_uniform(costs: CostTable, entries: np.ndarray) -> dict[str, float] | None:
    """Step time and memory of uniform LoRA with as many parameters as a choice, by resource, and its parameters.

    None where no step is recorded, or nothing is chosen, or there is no LoRA to compare with.
    """
    if "step_ms" not in costs.source or not any(costs.options[int(entry)].method != NONE for entry in entries):
        return None
    other = uniform_entries(costs, float(costs.cost__ro[PARAMS, entries].sum()))
    if not len(other):
        return None
    total = costs.total(other)
    return {name: float(total[name]) for name in ("trainable_params", "vram_gb", "step_ms")}
