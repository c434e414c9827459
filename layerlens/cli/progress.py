"""Progress bars on a terminal; one line for each finished stage where stderr is a file or a pipe."""

from __future__ import annotations

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
