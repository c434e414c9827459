"""Files of a job: all of them or none, the report among them, and the result that names them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from layerlens.data.table import LABELS, TEXTS
from layerlens.jobs.decision import Decision
from layerlens.jobs.job import Job
from layerlens.jobs.result import REPORT_FILE, SOLVER_LOG_FILE, RunResult
from layerlens.manifest import write_report
from layerlens.models import FrontierRow, Manifest, ModelStatistics
from layerlens.models.data_summary import DataSummary
from layerlens.storage import local_or_url
from layerlens.tuning.recipes import recipes, why_fewer
from layerlens.utils.atomic import atomic_write_text, staged_directory


@dataclass
class Writing:
    """Files of a job beside their place; they are moved into it when all are there.

    Args:
        directory: where they are written.
        files: name -> path there.
        created_at: what manifest and report say of when it was.
    """

    directory: Path
    files: dict[str, Path] = field(default_factory=dict)
    created_at: str = field(default_factory=lambda: now())


@contextmanager
def writing(job: Job, owned: Collection[str]) -> Iterator[Writing]:
    """Write into ``job.output`` whole or not at all; ``owned`` of an earlier job is replaced or removed."""
    with staged_directory(job.output, owned=owned) as staging:
        written = Writing(staging)
        yield written
        written.files = {name: job.output / path.relative_to(staging) for name, path in written.files.items()}


def report(
    decision: Decision, statistics: ModelStatistics, checked: dict[str, Any], written: Writing,
    hulls: Mapping[str, Sequence[FrontierRow]], data: DataSummary | None = None, output: str = "",
) -> None:  # fmt: skip
    """Write the report, and the solver's log as JSON lines; ``output`` is the directory as the configuration has it."""
    solution = decision.solution
    shown = "" if Path(output).is_absolute() or local_or_url(output)[1] else output  # others may move the directory
    path, manifest = written.directory / REPORT_FILE, decision.manifest
    write_report(
        path,
        manifest=manifest,
        created_at=written.created_at,
        recipes=recipes(manifest, written.directory, _columns(manifest, data), shown),
        recipes_from="the folder of the configuration" if shown else "the directory of this report",
        fewer_recipes=why_fewer(manifest),
        utilities=solution.utilities,
        costs=solution.costs,
        statistics=statistics,
        measured=checked,
        explanations=solution.explanations,
        frozen=solution.frozen,
        events=solution.events,
        data=data,
        hulls=hulls,
    )
    lines = "".join(json.dumps(asdict(event)) + "\n" for event in solution.events)
    log = atomic_write_text(written.directory / SOLVER_LOG_FILE, lines)
    written.files |= {"report": path, "solver_log": log}


def _columns(manifest: Manifest, data: DataSummary | None) -> dict[str, str]:
    """Where the samples stand, for code that reads them: the source, and its columns as far as they are known."""
    said = (manifest.provenance.config or {}).get("data") or {}
    found = {"source": str(said.get("source") or "")}
    for part, usual in (("text", TEXTS), ("label", LABELS)):
        named = said.get(f"{part}_column")
        named = named[0] if isinstance(named, list) and len(named) == 1 else named
        used = [name for name in (data.used if data else ()) if name.lower() in usual]
        if isinstance(named, str) or len(used) == 1:
            found[part] = named if isinstance(named, str) else used[0]
    return found


def result_of(
    job: Job, decision: Decision, written: Writing, checked: dict[str, Any], *, from_cache: bool,
    data: DataSummary | None = None,
) -> RunResult:  # fmt: skip
    """What the job hands back."""
    return RunResult(
        decision.manifest,
        job.output,
        written.files,
        statistics_from_cache=from_cache,
        seconds=job.clock.seconds,
        measured=checked,
        explanations=decision.solution.explanations,
        frozen=decision.solution.frozen,
        warnings=tuple(job.warnings.lines),
        data=data,
    )


def now() -> str:
    """The time that a manifest records, UTC to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
