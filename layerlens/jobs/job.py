"""The job: a configuration, and all that carrying it out takes on this machine.

Every stage of a job is a function ``(Job, noun) -> noun``. What is the same for all stages (where relative paths start,
who is told of progress and warnings, the processes, threads, device and cache) is in the ``Job`` and nowhere else.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from layerlens.config import RunConfig
from layerlens.exceptions import ConfigurationError, OutputError
from layerlens.integrations.torch_modules import usable_device
from layerlens.profiling.cache import SensitivityCache, open_cache
from layerlens.utils.atomic import check_writable
from layerlens.utils.processes import ALONE, Processes
from layerlens.utils.progress import Progress, observed_stage, silent
from layerlens.utils.threads import resolve_threads, set_threads

Warn = Callable[[str], None]


def unheard(_line: str) -> None:
    """Warnings that nobody is told."""


class Warnings:
    """Lines for the user, told at once and kept for the result."""

    def __init__(self, tell: Warn = unheard) -> None:
        self.tell = tell
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        """Tell and keep a line."""
        self.lines.append(line)
        self.tell(line)


@dataclass
class Clock:
    """Wall time of each stage in seconds; whoever observes the job is told of each."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block as the stage ``name``."""
        start = time.perf_counter()
        try:
            with observed_stage(name):
                yield
        finally:
            self.seconds[name] = time.perf_counter() - start


@dataclass(frozen=True)
class Job:
    """One job on this machine.

    Args:
        config: what to do.
        base_dir: folder that relative paths in the configuration start from.
        output: local directory for the results.
        progress: told of the long steps.
        warnings: told of what the user should know.
        clock: times the stages.
        threads: CPU threads of this process.
        processes: those that do the job together.
        device: where the model runs.
        cache: the sensitivity cache; None where nothing is taken from it or kept in it.
    """

    config: RunConfig
    base_dir: Path
    output: Path
    progress: Progress = silent
    warnings: Warnings = field(default_factory=Warnings)
    clock: Clock = field(default_factory=Clock)
    threads: int = 1
    processes: Processes = ALONE
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    cache: SensitivityCache | None = None


def job_without_model(config: RunConfig, base_dir: Path, output: Path, progress: Progress, warn: Warn = unheard) -> Job:
    """A job of one process that loads no model.

    Raises:
        OutputError: the output directory cannot be written.
        ConfigurationError: there are too many threads for this machine.
    """
    check_writable(output)
    threads = resolve_threads(config.runtime.threads)
    return Job(config, base_dir, output, progress, Warnings(warn), threads=threads)


def job_with_model(
    config: RunConfig, base_dir: Path, output: Path, progress: Progress, warn: Warn, processes: Processes,
    use_cache: bool,
) -> Job:  # fmt: skip
    """A job of all ``processes`` that measures a model; threads, device and cache are set up for it.

    Raises:
        OutputError: the output directory or the cache cannot be used.
        ConfigurationError: the processes, the device or the threads do not fit the configuration.
    """
    same_everywhere(processes, "configuration", config.model_dump(mode="json"))
    if processes.first:
        check_writable(output)
    cache = open_cache(config.runtime.cache_dir, base_dir) if use_cache else None
    if cache:
        shared_directory(processes, cache.directory)
    threads = resolve_threads(config.runtime.threads, processes.place.local_size)
    set_threads(threads)
    device = usable_device(config.runtime.device)
    return Job(config, base_dir, output, progress, Warnings(warn), Clock(), threads, processes, device, cache)


VISIBLE_WITHIN_S = 5.0
"""Network file systems show a new file to other machines after a moment."""


def _differences(told: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, str, Any, Any]]:
    """(process, key, value in process 0, value there) of the first key by which each process differs from process 0."""
    for rank, other in enumerate(told):
        found = first_difference(told[0], other)
        if found is not None:
            yield (rank, *found)


def same_everywhere(processes: Processes, topic: str, told: dict[str, Any]) -> None:
    """Make sure that all processes say the same: of their configuration, and of what each would measure.

    Args:
        processes: all of them must call this.
        topic: "configuration" or "identity".
        told: what this one says, as JSON values.

    Raises:
        ConfigurationError: names the first thing that differs, and in which process.
    """
    differs, remedy = {
        "configuration": ("has another configuration than", "give all processes the same file"),
        "identity": ("would measure something else than", "give all machines the same model, data and versions"),
    }[topic]
    for rank, name, first, there in _differences(processes.everyone(topic, told)):
        raise ConfigurationError(
            f"process {rank} {differs} process 0: {name} is {there!r} there and {first!r} in process 0; {remedy}"
        )


def shared_directory(processes: Processes, directory: Path) -> None:
    """Make sure that what process 0 writes into ``directory`` is seen by all processes.

    Raises:
        OutputError: a process does not see it, so an interrupted run could not be taken up.
    """
    if processes.alone:
        return
    name = f".shared-{uuid.uuid4().hex}"
    if processes.first:
        try:
            (directory / name).touch()
        except OSError as error:
            raise OutputError(f"runtime.cache_dir: cannot write {directory}: {error.strerror}") from error
    name, written_to = processes.from_first("probe", (name, str(directory.absolute())))
    try:
        end = time.monotonic() + VISIBLE_WITHIN_S
        while not (seen := name in os.listdir(directory)) and time.monotonic() < end:
            time.sleep(0.1)
        told = processes.everyone("sees the cache", (seen, socket.gethostname()))
    finally:
        if processes.first:
            with contextlib.suppress(OSError):
                (directory / name).unlink(missing_ok=True)
    for rank, (sees, host) in enumerate(told):
        if not sees:
            raise OutputError(
                f"runtime.cache_dir: process {rank} on {host} does not see what process 0 wrote to {written_to}; give "
                "a directory that all machines share, or run with --no-cache"
            )


def first_difference(one: Any, other: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """(dotted name, value, other value) of the first difference between two JSON values; None where they are equal.

    >>> first_difference({"a": {"b": 1}}, {"a": {"b": 2}})
    ('a.b', 1, 2)
    """
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            found = first_difference(one.get(key), other.get(key), f"{name}.{key}".lstrip("."))
            if found is not None:
                return found
        return None
    return None if one == other else (name, one, other)
