"""The one place that turns exceptions into one clear line on stderr and an exit code.

0 done; 1 unexpected, and what could not be measured or solved; 2 usage or configuration; 3 infeasible budgets; 4 model
or data not found; 130 interrupted; 143 terminated; 129 its terminal was closed; 141 the reader of a text has seen
enough. Tracebacks are for ``--debug``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import typer

from layerlens.cli import output
from layerlens.cli.signals import Terminated, catch_signals, no_more_to_do
from layerlens.exceptions import LayerLensError, OutputError, ProcessLostError

INTERRUPTED, UNEXPECTED = 130, 1
Command = TypeVar("Command", bound=Callable[..., None])


def guarded(when_stopped: str = "") -> Callable[[Command], Command]:
    """Decorator of every command: its exceptions become one line and an exit code.

    Args:
        when_stopped: what to tell someone who interrupted the command.
    """

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(*args: Any, **kwargs: Any) -> None:
            debug = output.state.debug or bool(kwargs.get("debug"))
            try:
                with warnings.catch_warnings():
                    if not (debug or output.state.verbose):  # what other libraries tell their developers
                        warnings.simplefilter("ignore", FutureWarning)
                        warnings.simplefilter("ignore", DeprecationWarning)
                    command(*args, **kwargs)
            except ProcessLostError as error:
                # Process 0 speaks for all; of the others only the one that failed does.
                _stop([] if error.told and _process() else [str(error)], error.exit_code, debug)
            except LayerLensError as error:
                _stop(
                    [line for line in str(error).splitlines() if line.strip()] or ["no message"], error.exit_code, debug
                )
            except KeyboardInterrupt:
                _stop([] if _process() else [_joined("interrupted", when_stopped)], INTERRUPTED, debug)
            except Terminated as error:
                _stop([] if _process() else [_joined(error.event, when_stopped)], error.exit_code, debug)
            except (typer.Exit, typer.Abort):
                raise
            except output.SeenEnough:
                raise typer.Exit(output.SeenEnough.exit_code) from None
            except MemoryError:
                _stop(
                    ["out of memory; lower data.batch_size, data.max_length or calibration_samples"], UNEXPECTED, debug
                )
            except Exception as error:  # what nobody foresaw still ends in one line
                words = " ".join(str(error).split()) or "no message"
                hint = "" if debug else "; run again with --debug for the traceback"
                _stop([f"unexpected {type(error).__name__}: {words}{hint}"], UNEXPECTED, debug)

        return run  # type: ignore[return-value]

    return decorate


def exit_cleanly(app: Callable[[], None]) -> NoReturn:
    """Run the whole program: signals unwind it, and what happens outside of a command is one line too."""
    catch_signals()
    code: int | str | None = 0
    try:
        app()
    except SystemExit as error:
        code = error.code
    except KeyboardInterrupt:
        output.error("interrupted")
        code = INTERRUPTED
    except Terminated as error:
        output.error(error.event)
        code = error.exit_code
    except output.SeenEnough as error:
        code = error.exit_code
    except OSError as error:  # help or version to where nothing can be written
        output.error(str(output.not_shown(error)))
        code = OutputError.exit_code
    no_more_to_do()
    sys.exit(output.close(code))


def _stop(lines: list[str], code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    rank = _process()
    for line in lines:
        output.error(f"process {rank}: {line}" if rank else line)
    if lines and "TORCHELASTIC_ERROR_FILE" in os.environ:
        _tell_torchrun(Path(os.environ["TORCHELASTIC_ERROR_FILE"]), lines)
    raise typer.Exit(code) from None


def _process() -> int:
    """Which of several processes that a launcher started this is; 0 where there is one."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0


def _tell_torchrun(file: Path, lines: list[str]) -> None:
    """Leave the reason where torchrun looks for it, so that its report has it in place of a traceback."""
    reason = {"message": "; ".join(lines), "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError):  # it is only a report
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(reason), encoding="utf-8")


def _joined(event: str, hint: str) -> str:
    return f"{event}; {hint}" if hint else event
