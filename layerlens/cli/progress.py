"""Progress bars on a terminal; elsewhere a line for each finished stage, and some lines while a long one goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

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

LINE_EVERY_S = 10.0
"""How often a stage that goes on says so where no bar can be drawn."""


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
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
    )
    with bars:
        yield _Bars(bars)


class _Bars:
    def __init__(self, bars: Bars) -> None:
        self.bars = bars

    @contextmanager
    def stage(self, description: str, total: int | None = None) -> Iterator[Advance]:
        task = self.bars.add_task(description, total=total, note="")

        def advance(steps: int = 1, /, note: str = "") -> None:
            self.bars.update(task, advance=steps)
            if note:
                self.bars.update(task, note=note)

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
        start = said = time.monotonic()
        done, last = 0, ""

        def advance(steps: int = 1, /, note: str = "") -> None:
            nonlocal done, said, last
            done, last, now = done + steps, note or last, time.monotonic()
            if now - said >= LINE_EVERY_S and (total is None or done < total):
                said = now
                self._line(f"{description}: {_so_far(done, total, now - start)}{f', {last}' if last else ''}")

        yield advance
        self._line(f"{description}: {time.monotonic() - start:.1f} s{f', {last}' if last else ''}")

    def _line(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)


def _so_far(done: int, total: int | None, seconds: float) -> str:
    """``40 of 120, about 1 min 20 s left``."""
    if total is None or not done:
        return f"{done:,}" if total is None else f"{done:,} of {total:,}"
    return f"{done:,} of {total:,}, about {duration(seconds * (total - done) / done)} left"


def duration(seconds: float) -> str:
    """A time as people say it.

    >>> duration(7.2), duration(80), duration(7300)
    ('8 s', '1 min 20 s', '2 h 1 min')
    """
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


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
