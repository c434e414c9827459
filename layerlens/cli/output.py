"""Where the command line writes: everything for people to stderr, results to stdout.

rich is imported only when something is shown, because ``layerlens --help`` must answer at once.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class State:
    """The options that stand before the command: ``layerlens --debug run ...``."""

    debug: bool = False
    verbose: bool = False


state = State()


def console() -> Console:
    """The console on stderr; made anew each time, since tests and tools replace sys.stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def error(line: str) -> None:
    """One ``error: ...`` line, never wrapped, so that tools find it whole."""
    _line("error", "bold red", line)


def warning(line: str, where: Console | None = None) -> None:
    """One ``warning: ...`` line; ``where`` is the console that draws bars at the moment."""
    _line("warning", "yellow", line, where)


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


def show_logs_if_verbose() -> None:
    """Send the package's log to stderr, where ``--verbose`` asks for it."""
    if not state.verbose:
        return
    import logging

    from layerlens.utils.logging import show_logs

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
    show_logs(handler)


def short(path: Path) -> str:
    """``path`` as one would type it from here: relative where it lies below the working directory."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:  # it lies elsewhere
        return str(path)


def _line(kind: str, style: str, line: str, where: Console | None = None) -> None:
    from rich.text import Text

    (where or console()).print(Text.assemble((f"{kind}: ", style), line), soft_wrap=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not a JSON value")
