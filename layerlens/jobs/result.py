"""What a job returns, who observes it, and where it is published.

The two context managers stand around every job::

    with observed("run", config) as outcome, published(config.output.directory, base_dir) as place:
        ...
        outcome.result = place.publish(result)
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from layerlens.config import RunConfig
from layerlens.jobs.recorded import STATISTICS
from layerlens.models import FrozenStage, LayerExplanation, Manifest
from layerlens.models.data_summary import DataSummary
from layerlens.models.manifest import RunRecord
from layerlens.storage import check_publishable, joined, local_or_url, publish
from layerlens.telemetry import telemetry_observers
from layerlens.tracking import tracking_observers
from layerlens.utils.launch import is_main_process
from layerlens.utils.observer import RunObserver, observed_stage, observing
from layerlens.utils.places import default_cache_dir

STATISTICS_FILE, REPORT_FILE, SOLVER_LOG_FILE = STATISTICS, "report.html", "solver_log.jsonl"
CHOICE_FILES = (
    "manifest.json", "manifest.yaml", "peft", "layerlens_modules.safetensors", "head.safetensors", REPORT_FILE,
    SOLVER_LOG_FILE,
)  # fmt: skip
"""What belongs to one choice: whatever of it an earlier choice left behind would contradict the new one."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Args:
        manifest: what was written.
        directory: the output directory.
        files: what was written where: manifest_json, manifest_yaml, statistics, report, solver_log, peft and modules
            where the manifest has layers for them, and head where a task head is new.
        statistics_from_cache: the model was not profiled again.
        seconds: wall time of each stage.
        measured: predicted against measured figures (see ``jobs.checks``).
        explanations: for each layer (or group that chooses alike) the runner-up and what would make it win.
        frozen: what going deeper than the lowest adapted layer would cost and gain, the nearest stage first; none where
            no budget limits depth.
        warnings: what the user should know, a line each.
        data: what was read; None where the choice was made from saved statistics.
        repeats: when the run was made that these files and figures are of (``jobs.repeated``); "" for a run of its own.
    """

    manifest: Manifest
    directory: Path
    files: dict[str, Path]
    statistics_from_cache: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    explanations: tuple[LayerExplanation, ...] = ()
    frozen: tuple[FrozenStage, ...] = ()
    warnings: tuple[str, ...] = ()
    data: DataSummary | None = None
    repeats: str = ""


@dataclass
class Outcome:
    """What an observed job sets before its block ends: its result, with ``files`` and perhaps a manifest."""

    result: Any = None


@contextmanager
def observed(kind: str, config: RunConfig) -> Iterator[Outcome]:
    """Tell telemetry and the trackers that ``config`` names of the job in the block.

    Raises:
        ConfigurationError: a tracker or exporter is not installed.
        TrackingError: the tracking server cannot be reached; nothing has been done yet.
    """
    observers: list[RunObserver] = []
    if is_main_process():
        observers += [*telemetry_observers(config.telemetry), *tracking_observers(config.tracking)]
    outcome = Outcome()
    with observing(kind, config, observers) as tell_end:
        yield outcome
        tell_end(record(kind, outcome.result))


def record(kind: str, result: Any) -> RunRecord:
    """What observers receive of a result."""
    return RunRecord(
        kind,
        manifest=getattr(result, "manifest", None),
        files=result.files,
        seconds=getattr(result, "seconds", {}),
        measured=getattr(result, "measured", {}),
        metrics=getattr(result, "metrics", {}),
        steps=getattr(result, "steps", ()),
        statistics_from_cache=getattr(result, "statistics_from_cache", None) if kind == "run" else None,
    )


@dataclass(frozen=True)
class Place:
    """Where a job writes, and what becomes of it.

    Args:
        directory: local directory that the job writes to.
        url: where it is published when it is whole; None where it stays.
        owned: names at the URL that belong to the job's result; those of an earlier one are replaced or removed.
    """

    directory: Path
    url: str | None = None
    owned: Collection[str] = ()

    def publish(self, result: Result) -> Result:
        """The result; where it was published, with its ``files`` and ``directory`` at the URL (``storage.shown``)."""
        if self.url is None:
            return result
        if is_main_process():
            with observed_stage("publish"):
                publish(self.directory, self.url, self.owned)
        local, url, moved = self.directory, self.url, {}
        for name, path in result.files.items():  # type: ignore[attr-defined]
            inside = path.is_relative_to(local)
            moved[name] = Path(joined(url, path.relative_to(local).as_posix())) if inside else path
        directory = {"directory": Path(url)} if hasattr(result, "directory") else {}
        return dataclasses.replace(result, files=moved, **directory)  # type: ignore[type-var]


@contextmanager
def published(
    directory: str | Path, base_dir: Path, owned: Collection[str] = (), *, resumes: bool = False
) -> Iterator[Place]:
    """Where a job for ``directory`` writes: there, or where it is a URL, into a local directory to publish from.

    The URL is tried before the job begins.

    Args:
        directory: a path, relative to ``base_dir``, or a URL.
        base_dir: folder that relative paths start from.
        owned: see ``Place``.
        resumes: the job goes on where it was stopped, so its local directory stays in the cache until it is published.

    Raises:
        ConfigurationError, OutputError: the URL cannot be written.
    """
    path, url = local_or_url(directory)
    if url is None:  # file:// is a local path
        yield Place(base_dir / path.expanduser())
        return
    if is_main_process():
        check_publishable(url)
    if not resumes:
        with tempfile.TemporaryDirectory(prefix="layerlens-") as work:
            yield Place(Path(work) / "out", url, owned)
        return
    local = default_cache_dir() / "unpublished" / hashlib.sha256(url.encode()).hexdigest()[:32]
    yield Place(local, url, owned)
    if is_main_process():
        shutil.rmtree(local)
