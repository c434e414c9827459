"""What the manifest records of the data, from the statistics alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from layerlens.models import ModelStatistics
from layerlens.models.statistics import EXPERT_TOKENS
from layerlens.profiling.cache import cache_key


def expert_tokens(statistics: ModelStatistics) -> dict[str, list[int]]:
    """Experts of a block -> the calibration tokens that went to each of them; empty without such experts."""
    found: dict[str, list[int]] = {}
    for layer in statistics.layers:
        for measured in layer.by_method.values():
            tokens = (measured.extra or {}).get(EXPERT_TOKENS)
            if tokens is not None:
                counts = [round(count) for count in np.asarray(tokens).tolist()]
                found.setdefault(layer.layer.rpartition(".")[0], counts)
    return found


def data_facts(statistics: ModelStatistics) -> dict[str, Any]:
    """What the manifest records of the data and of what was measured on it for the whole model."""
    identity = statistics.provenance["identity"]
    facts = {"key": cache_key(identity), **identity["data"]}
    if tokens := expert_tokens(statistics):
        facts["expert_tokens"] = tokens
    kernel = statistics.kernel
    if kernel is not None:
        facts["neural_tangent_kernel"] = {
            "samples": len(kernel.gram),
            "trace": kernel.trace,
            "effective_rank": kernel.effective_rank,
            "target_alignment": kernel.target_alignment,
        }
    return facts
