"""The report of a training: the run's report with loss curves and metrics in it, of all trainings of one choice."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from layerlens.jobs.result import REPORT_FILE
from layerlens.manifest.training import training_page
from layerlens.storage import local_or_url
from layerlens.utils.atomic import atomic_write_text

METRICS_FILE = "metrics.json"
MOST_BYTES = 64 << 20


def write_training_report(facts: Mapping[str, Any], output: Path, manifest: Path, params: int, place: Path) -> Path:
    """Write the report of a training into ``place``: the same bytes for the same training, so without its times.

    Args:
        facts: what metrics.json says of it.
        output: the directory of the training.
        manifest: what was trained; trainings in folders beside it are shown too, and its report is gone on with.
        params: parameters of the choice; a baseline of another number belongs to another choice.
        place: where the directory is written.
    """
    trained = _beside(facts, output, manifest, params)
    return atomic_write_text(place / REPORT_FILE, training_page(trained, _report(manifest), timed=False))


def refresh_run_report(
    facts: Mapping[str, Any], output: Path, manifest: Path, params: int, warn: Callable[[str], None]
) -> None:
    """Show the training in the report beside the manifest too, where there is one that can be written."""
    report = _report(manifest)
    if report is None:
        return
    try:
        trained = _beside(facts, output, manifest, params)
        atomic_write_text(manifest.parent / REPORT_FILE, training_page(trained, report))
    except Exception as error:  # a report is no reason to lose a training
        warn(f"{manifest.parent / REPORT_FILE}: the training could not be shown there: {' '.join(str(error).split())}")


def _report(manifest: Path) -> str | None:
    path, url = local_or_url(manifest)
    report = path.parent / REPORT_FILE
    if url is not None or not report.is_file() or report.stat().st_size > MOST_BYTES:
        return None
    try:
        return report.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _beside(facts: Mapping[str, Any], output: Path, manifest: Path, params: int) -> list[Mapping[str, Any]]:
    """This training and others of the same choice on the same data, the choice's own first, one of each name."""
    found: dict[str, Mapping[str, Any]] = {_name(facts): facts}
    path, url = local_or_url(manifest)
    others = [] if url is not None else sorted(path.absolute().parent.glob(f"*/{METRICS_FILE}"))
    for file in others:
        if file.parent == output.absolute():
            continue
        try:
            other = json.loads(file.read_text(encoding="utf-8"))
            same = all(other[part]["fingerprint"] == facts[part]["fingerprint"] for part in ("model", "samples"))
            same = same and (other.get("baseline") or {}).get("budget_params", params) == params
            same = same and bool(other["training"]["losses"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # of somebody else
        if same:
            found.setdefault(_name(other), other)
    return sorted(found.values(), key=lambda each: _name(each) != "")


def _name(facts: Mapping[str, Any]) -> str:
    return str((facts.get("baseline") or {}).get("name") or "")
