"""What a choice is worth: time and memory beside uniform LoRA of as many parameters, gain beside LoRA everywhere."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from layerlens.methods import enumerate_options
from layerlens.models import LORA, NONE, RESOURCES, CostTable, ModelSpec, Option, UtilityTable
from layerlens.models.tables import Everywhere
from layerlens.registry import METHODS
from layerlens.utils.order import raised_evenly

PARAMS = RESOURCES.index("trainable_params")
EVERYWHERE_RANKS = (1, 2, 4, 8, 16, 32)
"""The largest that a layer takes is its rank in LoRA everywhere: 32, but for small and grouped layers."""


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
    """What uniform LoRA with as many parameters as a choice uses of each resource.

    None where no step is recorded, or nothing is chosen, or there is no LoRA to compare with.
    """
    if "step_ms" not in costs.source or not any(costs.options[int(entry)].method != NONE for entry in entries):
        return None
    other = uniform_entries(costs, float(costs.cost__ro[PARAMS, entries].sum()))
    if not len(other):
        return None
    total = costs.total(other)
    return {name: float(total[name]) for name in RESOURCES if name in total}


def lora_everywhere(
    spec: ModelSpec, own: UtilityTable, table_of: Callable[[Sequence[Option]], UtilityTable]
) -> Everywhere | None:
    """What LoRA of rank 32 on every layer that takes LoRA would gain by the same utilities.

    None where no layer takes LoRA, or where the utility of an option depends on the other options of the table.

    Args:
        spec: the model.
        own: utilities of the options on offer.
        table_of: the utilities of any options.
    """
    largest: dict[str, Option] = {}
    for option in enumerate_options(spec, {LORA: EVERYWHERE_RANKS}):
        if option.method == LORA:
            largest[option.layer] = option  # ranks ascend
    together = tuple(dict.fromkeys((*own.options, *largest.values())))
    if not largest:
        return None
    table = table_of(together)
    if not np.allclose(table.utility[: len(own.options)], own.utility, rtol=1e-4):
        return None
    place = {option: index for index, option in enumerate(together)}
    entries = [place[option] for option in largest.values()]
    layers = {layer.name: layer for layer in spec.layers}
    replicates = np.zeros(0) if table.calibration is None else table.calibration.replicates__bo[:, entries].sum(axis=1)
    params = sum(METHODS[LORA].trainable_params(layers[option.layer], option.rank) for option in largest.values())
    return Everywhere(float(table.utility[entries].sum()), int(params), replicates)


def beside_rank_32(utilities: UtilityTable, chosen: np.ndarray) -> dict[str, float] | None:
    """The share of that gain which the chosen entries have, with its 95 % interval where proxies were trained."""
    other = utilities.everywhere
    if other is None or other.gain <= 0.0:
        return None
    found = {"share": float(utilities.utility[chosen].sum()) / other.gain, "trainable_params": other.trainable_params}
    if utilities.calibration is not None and len(other.replicates__b) and (other.replicates__b > 0.0).all():
        shares = utilities.calibration.replicates__bo[:, chosen].sum(axis=1) / other.replicates__b
        found["low"], found["high"] = (float(end) for end in np.percentile(shares, [2.5, 97.5]))
    return found
