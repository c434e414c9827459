"""Where the command line writes: everything for people to stderr, results to stdout.

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
    from layerlens.utils.logging import show_logs

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                warning(record.getMessage())
            else:
                note(f"{record.name}: {record.getMessage()}")

    show_logs(Lines(), logging.DEBUG if state.verbose else logging.ERROR if quiet else logging.WARNING)


def short(path: Path) -> str:
    """``path`` as one would type it from here: relative where it lies below the working directory, or the URL."""
    from layerlens.storage.url import shown, url_of

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
        from layerlens.storage.url import shown

        return shown(value)
    raise TypeError(f"{type(value).__name__} is not a JSON value")
