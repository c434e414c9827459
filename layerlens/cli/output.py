"""Where the command line writes (for people to stderr, results to stdout), and figures with their units.

rich is imported only when something is shown, because ``layerlens --help`` must answer at once.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
