"""The report's layers: the allocation as a map of blocks and roles, and everything that is known of each layer."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from layerlens.integrations.transformers import role_of
from layerlens.manifest.formats import method_name, number, percent, quantity
from layerlens.manifest.layer_names import positions
from layerlens.models import NONE, LayerExplanation, Manifest, ManifestRow, ModelStatistics
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
        entry = {
            "method": row.method,
            "rank": row.rank,
            "layer": row.layer,
            "strength": round(15 + 40 * strength),
            "count": 1,
        }
        cells.setdefault((place.block, place.role), []).append(entry)
    return {
        "roles": list(roles),
        "blocks": [
            {"name": block, "cells": [_merged(cells.get((block, role), [])) for role in roles]} for block in blocks
        ],
        "methods": [method for method in METHODS if largest[method]],
    }


def _merged(cell: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The layers of one cell; of many, such as experts, those that got the same are one entry with their number."""
    if len(cell) <= MOST_IN_A_CELL:
        return cell
    alike: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for entry in cell:
        alike.setdefault((entry["method"], entry["rank"]), []).append(entry)
    return [
        each[0] | {"count": len(each), "layer": f"{each[0]['layer']} to {each[-1]['layer']}"}
        if len(each) > 1
        else each[0]
        for each in alike.values()
    ]


MOST_IN_A_CELL = 3
"""Layers of one role and block that the heat map shows one by one."""
COLUMNS = ("Layer", "Choice", "Score", "Runner-up", "Utility", "Noise", "Parameters", "FLOPs", "Memory", "Latency")
"""Of the table of layers; the runner-up is left out where nothing explains it."""


def layer_groups(
    manifest: Manifest, statistics: ModelStatistics, explanations: Sequence[LayerExplanation]
) -> list[dict[str, Any]]:
    """The rows of the table of layers by block, in the model's order: what a block is called, what it got, its rows."""
    places = positions([row.layer for row in manifest.allocations])
    groups: list[dict[str, Any]] = []
    last: object = None
    for row, shown in zip(manifest.allocations, layer_rows(manifest, statistics, explanations), strict=True):
        place = places[row.layer]
        block = (place.stack, place.block)
        if block != last or not groups:
            stack = f"{place.stack}.{place.block}" if place.stack else f"block {place.block}"
            groups.append({"name": "outside of the blocks" if place.block is None else stack, "rows": [], "of": []})
            last = block
        prefix = f"{place.stack}.{place.block}." if place.stack and place.block is not None else ""
        shown["prefix"] = prefix if row.layer.startswith(prefix) else ""
        shown["layer"] = row.layer.removeprefix(shown["prefix"])
        groups[-1]["rows"].append(shown)
        groups[-1]["of"].append(row)
    for group in groups:
        rows: list[ManifestRow] = group.pop("of")
        adapted = sum(row.method != NONE for row in rows)
        parts = [f"{adapted} of {len(rows)} layers adapted"]
        if adapted:
            parts += [f"{number(sum(row.cost for row in rows))} parameters"]
            parts += [f"score {number(sum(row.total_score for row in rows))}"]
        group["summary"] = ", ".join(parts)
    return groups


def layer_rows(
    manifest: Manifest, statistics: ModelStatistics, explanations: Sequence[LayerExplanation]
) -> list[dict[str, Any]]:
    """A row for each layer: its choice, the runner-up, and its figures as text and as a number to sort by."""
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
        figures = [
            (row.total_score, number(row.total_score)),
            (row.utility, number(row.utility)),
            (row.cost, number(row.cost)),
            (row.flops, quantity("flops", row.flops)),
            (row.vram, quantity("vram_gb", row.vram)),
            (row.latency, quantity("latency_ms", row.latency)),
        ]
        cells = [_cell(value, text) if row.rank else _cell(None, "–") for value, text in figures]
        cells.insert(2, _cell(noise, "–" if noise is None else percent(noise)))
        rows.append(
            {
                "layer": row.layer,
                "rank": row.rank,
                "choice": f"{method_name(row.method)} {row.rank}" if row.rank else method_name(row.method),
                "cells": cells,
                "runner_up": runners_up.get(row.layer, "–"),
            }
        )
    return rows


def _cell(value: float | None, text: str) -> dict[str, str]:
    return {"value": "" if value is None or not math.isfinite(value) else f"{value:.5g}", "text": text}


def _runner_up(explanation: LayerExplanation) -> str:
    """The second choice of a layer, and how much more score it would need at the shadow prices."""
    other = explanation.runner_up
    if other is None or explanation.value_to_flip is None:
        return "no other option"
    name = f"{method_name(other.method)} {other.rank}" if other.rank else "none"
    if explanation.value_to_flip <= 0:
        return f"{name}, which scores as high but does not fit beside the other choices"
    return f"{name}, short of {number(explanation.value_to_flip)}"
