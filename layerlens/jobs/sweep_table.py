"""The results of a sweep as one table: what was varied, and what each manifest says."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerlens.jobs.sweep import Sweep, SweepTask
from layerlens.models import Manifest
from layerlens.registry import METHODS
from layerlens.utils.atomic import atomic_write_text

CSV_FILE, JSON_FILE = "table.csv", "table.json"


def collect(sweep: Sweep, tasks: Sequence[SweepTask]) -> tuple[list[dict[str, Any]], dict[str, Path]]:
    """One row for each task, and the two files that they are written to.

    Numbers of a task that is not finished are None (empty in the CSV).

    Raises:
        OutputError: the directory cannot be written.
    """
    rows = [_row(sweep, task) for task in tasks]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: row.get(name) for name in columns} for row in rows)
    files = {
        "csv": atomic_write_text(sweep.directory / CSV_FILE, text.getvalue()),
        "json": atomic_write_text(sweep.directory / JSON_FILE, json.dumps(rows, indent=2) + "\n"),
    }
    return rows, files


def _row(sweep: Sweep, task: SweepTask) -> dict[str, Any]:
    manifest = sweep.manifest_of(task)
    status = {"status": "missing" if manifest is None else manifest.status}
    return {"task": task.task, "name": task.name, **task.settings, **status, **_numbers(manifest)}


def _numbers(manifest: Manifest | None) -> dict[str, Any]:
    """Utility, certificate and costs of a manifest."""
    uses = {} if manifest is None else {use.resource: use.total for use in manifest.resources}
    rows = () if manifest is None else manifest.allocations
    adapted = [row for row in rows if row.method != "none"]
    counts = {method: sum(row.method == method for row in adapted) for method in METHODS}
    return {
        "predicted_gain": manifest and manifest.predicted.gain,
        "gain_unit": manifest and manifest.utility_unit,
        "score": manifest and manifest.score,
        "upper_bound": manifest and manifest.upper_bound,
        "gap": manifest and manifest.gap,
        **{resource: uses.get(resource) for resource in ("trainable_params", "flops", "vram_gb", "latency_ms")},
        "layers": manifest and len(adapted),
        **{method: manifest and count for method, count in counts.items()},
        "statistics": manifest and (manifest.provenance.statistics or {}).get("key"),
    }
