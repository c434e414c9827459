"""The report's layers: the allocation as a map of blocks and roles, and everything that is known of each layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from layerlens.integrations.transformers import role_of
from layerlens.manifest.formats import method_name, number, percent, quantity
from layerlens.models import LayerExplanation, Manifest, ManifestRow, ModelStatistics
from layerlens.registry import METHODS


@dataclass(frozen=True)
class Place:
    """Where a layer stands in the model: its block (a row of the heat map) and its role in it (a column)."""

    block: str
    role: str


def place_of(layer: str) -> Place:
    """The first number in a module path is the block; what follows it is the role.

    >>> place_of("bert.encoder.layer.3.attention.self.query")
    Place(block='3', role='query')
    >>> place_of("bert.pooler.dense")
    Place(block='', role='bert.pooler.dense')
    """
    found = re.fullmatch(r"(?:.*?\.)?(\d+)(?:\.(.+))?", layer)
    if not found:
        return Place("", layer)
    inner = (found[2] or "block").removesuffix(".self")  # BERT's attention.self
    return Place(found[1], role_of(inner).replace("_", " ") or inner)


def heat_map(rows: Sequence[ManifestRow]) -> dict[str, Any]:
    """The allocation as a table: a row for each block, a column for each role, in the model's order.

    A cell has the methods and ranks of its layers and the strength of its colour: the rank as a share of the largest
    rank of its method.
    """
    largest = {method: max((row.rank for row in rows if row.method == method), default=0) for method in METHODS}
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    blocks = dict.fromkeys(place_of(row.layer).block for row in rows)
    roles: dict[str, None] = {}  # in order of appearance
    for row in rows:
        place = place_of(row.layer)
        roles[place.role] = None
        strength = row.rank / largest[row.method] if row.rank else 0.0
        entry = {"method": row.method, "rank": row.rank, "layer": row.layer, "strength": round(15 + 40 * strength)}
        cells.setdefault((place.block, place.role), []).append(entry)
    return {
        "roles": list(roles),
        "blocks": [{"name": block, "cells": [cells.get((block, role), []) for role in roles]} for block in blocks],
        "methods": [method for method in METHODS if largest[method]],
    }


def layer_rows(
    manifest: Manifest, statistics: ModelStatistics, explanations: Sequence[LayerExplanation]
) -> list[dict[str, Any]]:
    by_name = statistics.by_name()
    runners_up = {name: _runner_up(each) for each in explanations for name in each.layers}
    rows = []
    for row in manifest.allocations:
        found = by_name.get(row.layer)
        of = found.by_method if found else {}
        measured = of.get(row.method) or next(iter(of.values()), None)
        noise = None
        if measured and measured.energy and measured.signal is not None:
            noise = 1.0 - max(measured.signal, 0.0) / measured.energy
        rows.append(
            {
                "layer": row.layer,
                "method": row.method,
                "name": method_name(row.method),
                "rank": row.rank,
                "utility": number(row.utility),
                "params": number(row.cost),
                "flops": quantity("flops", row.flops),
                "vram": quantity("vram_gb", row.vram),
                "latency": quantity("latency_ms", row.latency),
                "score": number(row.total_score),
                "noise": "–" if noise is None else percent(noise),
                "runner_up": runners_up.get(row.layer, "–"),
            }
        )
    return rows


def _runner_up(explanation: LayerExplanation) -> str:
    """The second choice of a layer, and how much more score it would need at the shadow prices."""
    other = explanation.runner_up
    if other is None or explanation.value_to_flip is None:
        return "no other option"
    name = f"{method_name(other.method)} {other.rank}" if other.rank else "none"
    if explanation.value_to_flip <= 0:
        return f"{name}, which scores as high but does not fit beside the other choices"
    return f"{name}, short of {number(explanation.value_to_flip)}"
