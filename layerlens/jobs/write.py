"""The last stage: manifest, adapter directory, statistics and report, all of them or none."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from layerlens.data.table import LABELS, TEXTS
from layerlens.engines import read_otherwise
from layerlens.jobs.choose import Decision
from layerlens.jobs.frontier import hull_rows, is_shared
from layerlens.jobs.job import Job
from layerlens.jobs.load import Loaded
from layerlens.jobs.measure import Measured, fit_new_head
from layerlens.jobs.result import REPORT_FILE, SOLVER_LOG_FILE, STATISTICS_FILE, RunResult
from layerlens.manifest import write_manifest, write_report
from layerlens.models import Choice, Manifest, ModelStatistics
from layerlens.models.data_summary import DataSummary
from layerlens.optimization import frontier
from layerlens.profiling.head import head_arrays
from layerlens.profiling.statistics_file import statistics_to_bytes
from layerlens.storage import local_or_url
from layerlens.tuning import export_adapter
from layerlens.tuning.initialization import beginnings_unmeasured, measured_factors
from layerlens.tuning.recipes import recipes, why_fewer
from layerlens.tuning.task_head import write_head
from layerlens.utils.atomic import atomic_write_bytes, atomic_write_text, staged_directory


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


def _trained_head(loaded: Loaded) -> dict[str, np.ndarray]:
    """The trained task head of a checkpoint whose weights stay on disk; nothing where the model has it."""
    pretrained = loaded.pretrained
    if pretrained.streamed is None or not loaded.task.new_head:
        return {}
    return head_arrays(pretrained.model, pretrained.trained_modules(), pretrained.streamed)


def export(job: Job, loaded: Loaded, measured: Measured, decision: Decision, written: Writing) -> Any:
    """Write manifest, adapter and statistics; LoRA's first A by layer, where it is measured."""
    manifest, model = decision.manifest, loaded.pretrained.model
    with job.clock.stage("export"):
        factors = measured_factors(
            model, manifest.choice, loaded.batches, loaded.task.loss, lambda: fit_new_head(job, loaded)
        )
        if unmeasured := beginnings_unmeasured(model, manifest.choice):
            job.warnings.add(unmeasured)
        written.files |= write_manifest(manifest, written.directory, created_at=now())
        head = measured.statistics.head
        trained = head or _trained_head(loaded)
        written.files |= export_adapter(manifest, model, written.directory, factors, head=trained)
        written.files |= write_head(head, written.directory)
        _tell_of_serving(job, manifest.choice)
        written.files["statistics"] = atomic_write_bytes(
            written.directory / STATISTICS_FILE, statistics_to_bytes(measured.spec, measured.statistics)
        )
    return factors


def _tell_of_serving(job: Job, choice: Choice) -> None:
    """rsLoRA of several ranks is the one case in which even an engine of one scale for the file is wrong."""
    if not choice.lora.use_rslora or choice.head_modules:
        return
    wrong = read_otherwise(choice.lora.alpha_over_r or 1.0, choice.lora_ranks(), rslora=True)
    if wrong:
        job.warnings.add(
            f"optimization.use_rslora: {', '.join(wrong)} scale layers of lower rank in peft/ differently from PEFT; "
            "after training, export for them with `layerlens export --serve ENGINE`"
        )


def report(
    decision: Decision, statistics: ModelStatistics, checked: dict[str, Any], written: Writing,
    data: DataSummary | None = None, output: str = "",
) -> None:  # fmt: skip
    """Write the report, and the solver's log as JSON lines; ``output`` is the directory as the configuration has it."""
    solution = decision.solution
    shown = "" if Path(output).is_absolute() or local_or_url(output)[1] else output  # others may move the directory
    path, problem, manifest = written.directory / REPORT_FILE, solution.problem, decision.manifest
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
        hulls={
            resource: hull_rows(problem, frontier(problem, resource))
            for resource in problem.resources
            if solution.saving is None and not is_shared(problem, resource)
        },
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
