"""Bars on a terminal, a line for each stage elsewhere; both end with the stage, also by an exception."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

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


def test_bars() -> None:
    last_frame = drawn(terminal=True).rpartition("✓ Loading [model]")[2].splitlines()
    assert "/" not in last_frame[0]
    assert last_frame[1].startswith("✓ Measuring gradients")
    assert "16/16" in last_frame[1]


@pytest.mark.parametrize("terminal", [True, False])
def test_interrupts_pass_through(terminal: bool) -> None:
    with pytest.raises(KeyboardInterrupt):
        drawn(terminal, fail=True)


def test_silent() -> None:
    with silent.stage("Measuring gradients", total=2) as advance:
        advance()
        advance(1)
