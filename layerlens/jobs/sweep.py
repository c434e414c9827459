"""Many runs that differ in a few settings: a list of independent tasks, each with a configuration file and one command.

The list (``tasks.jsonl``) is all that a scheduler needs. A task is finished when its manifest is there, whole, and was
made by exactly its configuration; so tasks can be started again, anywhere and in any order.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from layerlens.config import RunConfig, SweepConfig, load_run_config, load_sweep, parse_run_config
from layerlens.config.loader import read_text
from layerlens.exceptions import ConfigurationError, ManifestError
from layerlens.faults import SweepFault
from layerlens.jobs.inputs import functions_of
from layerlens.jobs.solve import recorded_config
from layerlens.manifest import read_manifest
from layerlens.models import Manifest
from layerlens.profiling.cache import cache_key
from layerlens.utils.atomic import atomic_write_text

TASKS_FILE, RESULTS, TASK_FILES, LOCKS, LOGS = "tasks.jsonl", "results", "tasks", "locks", "logs"
NOT_MEASURED = ("optimization", "output", "training", "study", "distributed")
"""Sections that statistics do not depend on: tasks that differ in nothing else share theirs."""


@dataclass(frozen=True)
class SweepTask:
    """One run of a sweep; paths are relative to the folder of the sweep's file.

    Args:
        task: its number in the list, from 0.
        name: what is varied in it, and a hash; the name of its files.
        settings: what is varied, by dotted key.
        config: its configuration file, whose own relative paths start from ``base_dir``.
        base_dir: folder of the base configuration.
        directory: where its results go.
        measures: the same for all tasks that can share their statistics.
        command: runs it, from the folder of the sweep's file.
    """

    task: int
    name: str
    settings: dict[str, Any]
    config: str
    base_dir: str
    directory: str
    measures: str
    command: str


@dataclass(frozen=True)
class Sweep:
    """A sweep's file, its folder and its directory."""

    path: Path
    config: SweepConfig

    @property
    def folder(self) -> Path:
        """Where the sweep's file is."""
        return self.path.absolute().parent

    @property
    def directory(self) -> Path:
        """Where everything of the sweep is written."""
        return self.folder / Path(self.config.directory).expanduser()

    def config_of(self, task: SweepTask) -> RunConfig:
        """The checked configuration of a task."""
        return load_run_config(self.folder / task.config)

    def manifest_of(self, task: SweepTask, config: RunConfig | None = None) -> Manifest | None:
        """The manifest of a finished task; None where it is missing, damaged, or of another configuration or code."""
        try:
            manifest = read_manifest(self.folder / task.directory / "manifest.json")
        except ManifestError:
            return None
        config = config or self.config_of(task)
        wanted, made_by = recorded_config(config), manifest.provenance.config
        wanted["model"]["task"] = wanted["model"]["task"] or manifest.model.task  # what was guessed is recorded
        functions = functions_of(config.model, config.data, self.folder / task.base_dir)
        if functions is not None and (functions.unknown or functions.digest != _functions_in(manifest)):
            return None
        return manifest if made_by == wanted else None


def _functions_in(manifest: Manifest) -> str:
    """Digest of the user's functions that a manifest was made with."""
    return str((manifest.provenance.statistics or {}).get("functions", ""))


def open_sweep(path: Path) -> Sweep:
    """The sweep in the file ``path``.

    Raises:
        ConfigurationError: the file cannot be read or is wrong.
    """
    return Sweep(path, load_sweep(path))


def write_tasks(sweep: Sweep) -> list[SweepTask]:
    """Check every task, write their configuration files and the list; results that are there stay.

    Raises:
        ConfigurationError: the base or a combination of settings is wrong; names the task.
        OutputError: the directory cannot be written.
    """
    base = sweep.folder / Path(sweep.config.base).expanduser()
    text = read_text(base)
    tasks: dict[str, tuple[SweepTask, RunConfig]] = {}
    for settings in sweep.config.combinations():
        task, config = _task(sweep, base, text, len(tasks), settings)
        if task.name in tasks:
            raise ConfigurationError(f"{sweep.path}: {_told(settings)} appears twice; give each value once")
        tasks[task.name] = task, config
    for task, config in tasks.values():
        head = f"# {task.command}   (relative paths start from {task.base_dir})\n"
        _write(sweep.folder / task.config, head + _as_yaml(config))
    lines = "".join(json.dumps(asdict(task)) + "\n" for task, _ in tasks.values())
    _write(sweep.directory / TASKS_FILE, lines)
    return [task for task, _ in tasks.values()]


def read_tasks(sweep: Sweep) -> list[SweepTask]:
    """The list as it was written.

    Raises:
        ConfigurationError: there is none, or it is not one.
    """
    path = sweep.directory / TASKS_FILE
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [SweepTask(**row) for row in rows]
    except FileNotFoundError as error:
        command = shlex.join(["layerlens", "sweep", str(sweep.path)])
        raise ConfigurationError(f"{path}: no task list; write it first with: {command}").of(
            SweepFault.MISSING
        ) from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigurationError(f"{path}: is not a task list ({error}); write it again").of(
            SweepFault.DAMAGED
        ) from error


def _task(sweep: Sweep, base: Path, text: str, number: int, settings: dict[str, Any]) -> tuple[SweepTask, RunConfig]:
    name = _name(settings)
    directory = Path(os.path.relpath(sweep.directory, base.parent))
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    overrides.append(f"output.directory={json.dumps(str(directory / RESULTS / name))}")
    try:
        config = parse_run_config(text, str(base), overrides)
        if config.runtime.cache_dir is None:
            shared = json.dumps(str(directory / "cache"))
            config = parse_run_config(text, str(base), [*overrides, f"runtime.cache_dir={shared}"])
    except ConfigurationError as error:
        raise ConfigurationError(f"{sweep.path}: with {_told(settings)}: {error}") from error
    if parse_run_config(_as_yaml(config), name) != config:
        raise ConfigurationError(f"{sweep.path}: {_told(settings)} does not survive being written as YAML")
    here = os.path.relpath(sweep.directory, sweep.folder)
    runtime = config.runtime.model_dump(mode="json", exclude={"cache_dir", "saving_time_share"})
    measured = {**config.model_dump(mode="json", exclude={*NOT_MEASURED, "runtime"}), "runtime": runtime}
    task = SweepTask(
        task=number,
        name=name,
        settings=settings,
        config=str(Path(here, TASK_FILES, f"{name}.yaml")),
        base_dir=os.path.relpath(base.parent, sweep.folder),
        directory=str(Path(here, RESULTS, name)),
        measures=cache_key(measured)[:16],
        command=shlex.join(["layerlens", "sweep", sweep.path.name, "--task", str(number)]),
    )
    return task, config


def _name(settings: dict[str, Any]) -> str:
    """Words for what is varied, and a hash that tells apart what the words do not."""
    words = []
    for key, value in settings.items():
        last = key.rpartition(".")[2]
        said = re.sub(r"[^A-Za-z0-9.]+", "-", Path(str(value)).name).strip("-.")
        words.append(said if last == "name_or_path" else f"{last}-{said}")
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"{'_'.join(words)[:80]}_{digest}"


def _told(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {json.dumps(value)}" for key, value in settings.items())


def _as_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False)


def _write(path: Path, text: str) -> None:
    """Write what is not there yet: hundreds of tasks of one sweep may look at the list at once."""
    try:
        if path.read_text(encoding="utf-8") == text:
            return
    except (OSError, UnicodeDecodeError):
        pass
    atomic_write_text(path, text)
