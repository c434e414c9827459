"""Where the command line writes (for people to stderr, results to stdout), and figures with their units.

rich is imported only when something is shown, because ``layerlens --help`` must answer at once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import OutputError
from layerlens.vocabulary import MOST_DIGITS, RESOURCES, as_float, prefixed, without_digits

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class State:
    """The options that stand before the command, and the console that draws bars at the moment, if any."""

    debug: bool = False
    verbose: bool = False
    live: Console | None = None


state = State()


class SeenEnough(BaseException):
    """The reader of a pipe closed it early (``| head``): no error and no message."""

    exit_code = 141  # as of a program that SIGPIPE ends


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

    with contextlib.suppress(OSError):  # a full disk behind stderr is no reason to stop
        console().print(Text(line), soft_wrap=True)


def result(text: str) -> None:
    """Text that the command was asked for, on stdout.

    Raises:
        SeenEnough: its reader has gone.
        OutputError: it cannot be written.
    """
    try:
        _write(text)
    except BrokenPipeError:
        raise SeenEnough from None
    except OSError as error:
        raise not_shown(error) from error


def json_result(value: Any) -> None:
    """One JSON document on stdout; paths become text.

    Raises:
        OutputError: it cannot be written to its end; a part of a document is of no use to its reader.
    """
    readable = (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")
    try:
        _write(json.dumps(value, indent=2, ensure_ascii=not readable, default=_plain))
    except OSError as error:
        raise not_shown(error) from error


def not_shown(error: OSError) -> OutputError:
    """The error of a result that cannot be shown."""
    if isinstance(error, OutputError):
        return error
    reason = "its reader closed it" if isinstance(error, BrokenPipeError) else error.strerror or str(error)
    return OutputError(f"cannot write to standard output: {reason}; the files that were written stay")


def close(code: int | str | None) -> int | str | None:
    """Write what is still held of stdout and stderr; the exit code, which that may change.

    Python does the same at its end, but with a traceback, and the exit code 120.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        _give_up(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            _line("error", "bold red", str(not_shown(error)))
        code = code or (SeenEnough.exit_code if isinstance(error, BrokenPipeError) else OutputError.exit_code)
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except OSError:
        _give_up(sys.stderr)
    return code


def _write(text: str) -> None:
    if sys.stdout is None:
        raise OSError(errno.EBADF, "it is closed")
    try:
        sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
        sys.stdout.flush()
    except OSError:
        _give_up(sys.stdout)
        raise


def _give_up(stream: Any) -> None:
    """What is still held for ``stream`` goes nowhere, so that Python's end does not try again."""
    with contextlib.suppress(OSError, ValueError):  # a stream of a test has no descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


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

    with contextlib.suppress(OSError):
        console().print(Text.assemble((f"{kind}: ", style), line), soft_wrap=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        from layerlens.storage.filesystem import shown

        return shown(value)
    raise TypeError(f"{type(value).__name__} is not a JSON value")


RESOURCE_NAMES = {name: resource.label for name, resource in RESOURCES.items()} | {
    "loss_drop": "loss drop of the choice in a proxy's steps",
    "uniform_loss_drop": "the same for equal ranks on all layers",
}


def amount(resource: str, value: float) -> str:
    """``value`` of ``resource`` with its unit: ``59,904``, ``57.3 M``, ``0.312 GB``, ``62.1 ms``."""
    value = as_float(value)
    if resource == "trainable_params" and abs(value) < MOST_DIGITS:
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
    value = as_float(value)
    if shown := without_digits(value):
        return shown
    if value == 0:
        return "0"
    if abs(value) >= MOST_DIGITS:
        return f"{value:.3g}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 1e-4:
        return f"{value:.3g}"
    return f"{value:.2e}"


def share(fraction: float) -> str:
    """A share as a percentage, never rounded up to a full 100 % nor down to 0."""
    percent = 100.0 * as_float(fraction)
    if without_digits(percent) or abs(percent) >= MOST_DIGITS:
        return f"{significant(percent)} %"
    if 99.5 <= percent < 100.0:
        return ">99 %"
    if 0.0 < percent < 0.5:
        return "<1 %"
    return f"{percent:.0f} %"


def gap(value: float) -> str:
    """An optimality gap with two digits; exact zero is 0 %, and what only rounding leaves is below 0.0001 %."""
    if 0 < value < 1e-6:
        return "<0.0001 %"
    percent = 100.0 * as_float(value)
    return f"{without_digits(percent) or f'{percent:.2g}'} %"
