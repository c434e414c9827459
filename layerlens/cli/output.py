"""What the command line writes: tables and progress on stderr, results and JSON on stdout, figures with their units."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

from layerlens.utils.progress import Advance, Progress
from layerlens.vocabulary import RESOURCES, prefixed

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class State:
    """The options that stand before the command, and the console that draws bars at the moment, if any."""

    debug: bool = False
    verbose: bool = False
    live: Console | None = None


state = State()


def console() -> Console:
    """The console on stderr: the one that draws bars, or a new one, since tests and tools replace sys.stderr."""
    from rich.console import Console

    return state.live or Console(stderr=True, highlight=False)


def error(line: str) -> None:
    """One ``error: ...`` line, never wrapped, so that tools find it whole."""
    _line("error", "bold red", line)


def warning(line: str) -> None:
    """One ``warning: ...`` line."""
    _line("warning", "yellow", line)


def note(line: str) -> None:
    """A line for people."""
    from rich.text import Text

    console().print(Text(line), soft_wrap=True)


def result(text: str) -> None:
    """Text that the command was asked for, on stdout."""
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")


def json_result(value: Any) -> None:
    """One JSON document on stdout; paths become text."""
    readable = (sys.stdout.encoding or "").lower().startswith("utf")
    result(json.dumps(value, indent=2, ensure_ascii=not readable, default=_plain))


def show_logs(*, quiet: bool = False) -> None:
    """Show what the package logs: warnings; with ``--verbose`` everything, with ``--quiet`` errors only."""
    from layerlens.utils.progress import show_logs

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                warning(record.getMessage())
            else:
                note(f"{record.name}: {record.getMessage()}")

    show_logs(Lines(), logging.DEBUG if state.verbose else logging.ERROR if quiet else logging.WARNING)


def short(path: Path) -> str:
    """``path`` as one would type it from here: relative where it lies below the working directory, or the URL."""
    from layerlens.storage.filesystem import shown, url_of

    if url_of(path):
        return shown(path)
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:  # it lies elsewhere
        return str(path)


def command(*words: str | Path) -> str:
    """A ``layerlens`` command to paste into a shell, whatever is in the names."""
    return shlex.join(["layerlens", *map(str, words)])


def _line(kind: str, style: str, line: str) -> None:
    from rich.text import Text

    console().print(Text.assemble((f"{kind}: ", style), line), soft_wrap=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        from layerlens.storage.filesystem import shown

        return shown(value)
    raise TypeError(f"{type(value).__name__} is not a JSON value")


@contextmanager
def shown_progress(console: Console) -> Iterator[Progress]:
    """A Progress on ``console``; bars are drawn until the block ends, and stay as a record of what was done."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    bars = Bars(
        SpinnerColumn(finished_text="[green]✓[/]" if console.encoding.startswith("utf") else "+"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        _Steps(),
        TimeElapsedColumn(),
        console=console,
    )
    with bars:
        yield _Bars(bars)


class _Bars:
    def __init__(self, bars: Bars) -> None:
        self.bars = bars

    @contextmanager
    def stage(self, description: str, total: int | None = None) -> Iterator[Advance]:
        task = self.bars.add_task(description, total=total)

        def advance(steps: int = 1, /) -> None:
            self.bars.advance(task, steps)

        try:
            yield advance
        except BaseException:
            self.bars.stop_task(task)
            raise
        done = self.bars.tasks[self.bars.task_ids.index(task)].completed
        self.bars.update(task, total=max(1, done), completed=max(1, done))


class _Lines:
    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def stage(self, description: str, total: int | None = None) -> Iterator[Advance]:
        start = time.monotonic()
        yield _ignore
        self.console.print(Text(f"{description}: {time.monotonic() - start:.1f} s"), soft_wrap=True)


class _Steps(ProgressColumn):
    """``12/16 0:00:07 left``, or nothing while the number of steps is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.left = MofNCompleteColumn(), TimeRemainingColumn()

    def render(self, task: Task) -> Text:
        if task.total is None or (task.finished and task.total <= 1):
            return Text("")
        if task.finished:
            return self.count.render(task)
        return Text.assemble(self.count.render(task), "  ", self.left.render(task), " left")


def _ignore(steps: int = 1, /) -> None:
    """Lines are written when a stage ends; steps are not shown."""


RESOURCE_NAMES = {name: resource.label for name, resource in RESOURCES.items()} | {
    "loss_drop": "loss drop of the choice in a proxy's steps",
    "uniform_loss_drop": "the same with all layers alike",
}


def amount(resource: str, value: float) -> str:
    """``value`` of ``resource`` with its unit: ``59,904``, ``57.3 M``, ``0.312 GB``, ``62.1 ms``."""
    if resource == "trainable_params":
        return f"{round(value):,}"
    if resource == "flops":
        return scaled(value)
    if resource == "vram_gb":
        return f"{significant(value)} GB" if abs(value) >= 0.1 or value == 0 else f"{significant(value * 1e3)} MB"
    if resource.endswith("_ms"):
        return f"{significant(value)} ms"
    return significant(value)


def scaled(value: float) -> str:
    """``value`` with three digits and a prefix: 57.3 M."""
    number, letter = prefixed(value)
    return f"{significant(number)} {letter}".rstrip()


def significant(value: float) -> str:
    """Three significant digits; no exponent where a person would not write one."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 1e-4:
        return f"{value:.3g}"
    return f"{value:.2e}"


def share(fraction: float) -> str:
    """A share as a percentage, never rounded up to a full 100 % nor down to 0."""
    percent = 100.0 * fraction
    if 99.5 <= percent < 100.0:
        return ">99 %"
    if 0.0 < percent < 0.5:
        return "<1 %"
    return f"{percent:.0f} %"


def gap(value: float) -> str:
    """An optimality gap with two digits; exact zero is 0 %, and what only rounding leaves is below 0.0001 %."""
    if 0 < value < 1e-6:
        return "<0.0001 %"
    return f"{100.0 * value:.2g} %"
