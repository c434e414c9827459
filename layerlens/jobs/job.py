"""The job: a configuration, and all that carrying it out takes on this machine.

Every stage of a job is a function ``(Job, noun) -> noun``. What is the same for all stages (where relative paths start,
who receives progress and warnings, the processes, threads, device and cache) is in the ``Job`` and nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from layerlens.config import RunConfig
from layerlens.jobs.together import same_everywhere, shared_directory
from layerlens.profiling.cache import SensitivityCache, open_cache
from layerlens.utils.atomic import check_writable
from layerlens.utils.observer import observed_stage
from layerlens.utils.processes import ALONE, Processes
from layerlens.utils.progress import Progress, silent
from layerlens.utils.threads import resolve_threads, set_threads

Warn = Callable[[str], None]


def unheard(_line: str) -> None:
    """Warnings that nobody receives."""


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
    """Wall time of each stage in seconds; observers of the job receive each."""

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
        progress: reports the long steps.
        warnings: called with each warning for the user.
        clock: times the stages.
        threads: CPU threads of this process.
        processes: those that do the job together.
        device: where the model runs, as torch names it: a job without a model goes without torch.
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
    device: str = "cpu"
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
    from layerlens.integrations.torch_modules import usable_device

    device = str(usable_device(config.runtime.device))
    return Job(config, base_dir, output, progress, Warnings(warn), Clock(), threads, processes, device, cache)
