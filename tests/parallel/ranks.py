"""What the processes of these tests do, forked from a server that has imported this module and torch with it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

import layerlens.cost.measure
from layerlens.cli.main import app
from layerlens.config import RunConfig
from layerlens.integrations.torchvision_import import make_torchvision_importable
from layerlens.jobs import together
from layerlens.pipeline import run_config
from layerlens.profiling.accumulators import SumShards
from layerlens.registry import METHODS, TASKS
from layerlens.utils.processes import joined

make_torchvision_importable()
# What a run imports in the end is imported once, and not in every process again.
import peft  # noqa: E402, F401
import torch._dynamo  # noqa: E402
import transformers.models.bert.modeling_bert  # noqa: E402, F401

for known in (METHODS, TASKS):
    list(known.values())


@dataclass(frozen=True)
class Outcome:
    """What came of one process: what its work returned, or its error and exit code."""

    value: Any
    error: str
    exit_code: int


def one(there: Connection, rank: int, size: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...]):
    """Do ``work`` as process ``rank`` of ``size``, as torchrun would have started it."""
    torch.set_num_threads(1)
    together.VISIBLE_WITHIN_S = 0.2
    layerlens.cost.measure.TIME_SHARE = 0.01
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        there.send(Outcome(work(*arguments), "", 0))
    except BaseException as error:
        there.send(Outcome(None, f"{type(error).__name__}: {error}", getattr(error, "exit_code", 1)))


@dataclass(frozen=True)
class Said:
    """What came of a command."""

    exit_code: int
    stdout: str
    stderr: str


def command(*arguments: str) -> Said:
    """``layerlens`` with these arguments, in this process."""
    done = CliRunner().invoke(app, list(arguments))
    return Said(done.exit_code, done.stdout, done.stderr)


class Watched:
    """Progress that counts the batches measured, and may stop, or be killed, before one."""

    def __init__(self, stop_after: int | None = None, how: str = "") -> None:
        self.left, self.how = stop_after, how
        self.measured = 0

    @contextmanager
    def stage(self, description: str, total: int | None = None) -> Iterator[Any]:
        def advance(count: int = 1) -> None:
            if description == "Measuring gradients" and count == 1:
                self.measured += 1
                if self.measured == self.left:
                    if self.how == "killed":
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise RuntimeError(self.how)

        yield advance


def run(settings: dict[str, Any], base_dir: Path) -> tuple[bytes, dict[str, str]]:
    """The whole job; the manifest's bytes as this process read them back, and the files that it was given."""
    result = run_config(RunConfig.model_validate(settings), base_dir=base_dir)
    assert result.manifest.status == "optimal"
    return result.files["manifest_json"].read_bytes(), {name: str(path) for name, path in result.files.items()}


def stopped_run(settings: dict[str, Any], base_dir: Path, stop_after: int | None, how: str) -> int:
    """The whole job in every process, its progress seen by all; how many batches this one measured."""
    progress = Watched(stop_after, how)
    from layerlens.jobs import run as module

    module.silent = progress  # what processes other than the first show their progress to
    run_config(RunConfig.model_validate(settings), base_dir=base_dir, progress=progress)
    return progress.measured


def wait_for_the_lost(timeout_s: float) -> None:
    """Process 1 vanishes without a word; the others wait for it."""
    with joined("gloo", "cpu", timeout_s) as processes:
        processes.everyone("hello", 1)
        if processes.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        processes.everyone("never", 1)


def talk(base: int) -> list[Any]:
    """A little of everything that processes say to each other."""
    with joined("auto", "cpu", 600.0) as processes:
        tensor = torch.full((3,), float(base + processes.rank))
        processes.add_up(tensor)
        copied = torch.full((2,), float(processes.rank))
        processes.copy_from_first(copied)
        said = processes.everyone("ranks", processes.rank)
        told = processes.from_first("word", f"from {processes.rank}")
        sent = processes.bytes_to_first(bytes([processes.rank] * (processes.rank + 1)))
        processes.check()
        return [tensor.tolist(), copied.tolist(), said, told, sent, list(processes.share_of(range(7)))]


def spread_sums() -> tuple[list[int], list[list[float]] | None]:
    """Two batches into a sum that is spread by rows: the shape of this process's share, and the whole at the first."""
    with joined("gloo", "cpu", 600.0) as processes:
        shards, shape = SumShards(processes), (2, 3, 2)  # 6 rows for 4 processes: 2 each, and padding
        share = shards.zeros(shape, torch.float32, torch.device("cpu"))
        for batch in range(2):
            shards.add(share, torch.arange(12.0).view(shape) * (processes.rank + 10 * batch))
        whole = shards.whole(share, shape)
        return list(share.shape), None if whole is None else whole.flatten(0, 1).tolist()
