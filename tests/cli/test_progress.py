"""Bars on a terminal, a line for each stage elsewhere; both end with the stage, also by an exception."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from layerlens.cli import progress as progress_module
from layerlens.cli.progress import shown_progress
from layerlens.utils.progress import silent


def drawn(terminal: bool, *, fail: bool = False) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)
    with shown_progress(console) as progress:
        with progress.stage("Loading [model]"):
            pass
        with progress.stage("Measuring gradients", total=16) as advance:
            for _ in range(8):
                advance()
            advance(4)
            if fail:
                raise KeyboardInterrupt
            advance(4)
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def test_lines() -> None:
    lines = drawn(terminal=False).splitlines()
    assert lines == ["Loading [model]: 0.0 s", "Measuring gradients: 0.0 s"]


def test_a_long_stage_says_how_far_it_is_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, *(4.0 * step for step in range(1, 10))])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(times))
    console = Console(file=io.StringIO(), width=100, color_system=None)
    with shown_progress(console) as progress, progress.stage("Training", total=6) as advance:
        for step in range(6):
            advance(1, note=f"loss {3 - 0.5 * step:g}")
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "Training: 3 of 6, about 12 s left, loss 2",
        "Training: 28.0 s, loss 0.5",
    ]


def test_a_bar_shows_what_came_of_the_last_step() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with shown_progress(console) as progress, progress.stage("Training", total=2) as advance:
        advance(1, note="loss 0.53")
        advance(1)
    assert isinstance(console.file, io.StringIO)
    assert "loss 0.53" in console.file.getvalue().rpartition("✓ Training")[2]


def test_bars() -> None:
    last_frame = drawn(terminal=True).rpartition("✓ Loading [model]")[2].splitlines()
    assert "/" not in last_frame[0]
    assert last_frame[1].startswith("✓ Measuring gradients")
    assert "16/16" in last_frame[1]


@pytest.mark.parametrize("terminal", [True, False])
def test_interrupts_pass_through(terminal: bool) -> None:
    with pytest.raises(KeyboardInterrupt):
        drawn(terminal, fail=True)


def test_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with silent.stage("Measuring gradients", total=2) as advance:
        advance()
        advance(1)
    assert capfd.readouterr() == ("", "")
