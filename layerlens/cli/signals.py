"""Signals unwind the program, so that everything is cleaned up, and end in one line whatever comes after the first.

Ctrl-C raises KeyboardInterrupt, SIGTERM and SIGHUP raise ``Terminated``. While that unwinds, a second one would break
the cleaning up: it is ignored, Ctrl-C for ``GRACE_S`` only, in case something hangs. When all is said, and Python is on
its way out, another signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from types import FrameType

GRACE_S, LATER_S = 5.0, 0.05
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


class Terminated(BaseException):
    """SIGTERM or SIGHUP arrived; like KeyboardInterrupt, it unwinds the run.

    Args:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)

    @property
    def exit_code(self) -> int:
        """What a shell gives for a program that this signal ended."""
        return CODES[self.number]

    @property
    def event(self) -> str:
        """What happened, in words."""
        if self.number == signal.SIGHUP:
            return "the terminal was closed"
        under = "TORCHELASTIC_RUN_ID" in os.environ
        return "terminated by torchrun; its report names the process that failed" if under else "terminated"


@dataclass
class _State:
    unwinding_since: float | None = None
    received: int | None = None
    ended: bool = False


_state = _State()


def catch_signals() -> None:
    """Let the three signals unwind the program; those that whoever started it ignores (nohup) stay ignored."""
    for number in CODES:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _received)
    sys.unraisablehook = _unraisable


def no_more_to_do() -> None:
    """Everything is cleaned up and said; from here on a signal ends the process without a word.

    The one that ended it is ignored: Python's own end takes its handler away, and it would change the exit code.
    """
    _state.ended = True
    if _state.received is not None:
        signal.signal(_state.received, signal.SIG_IGN)


def _received(number: int, _frame: FrameType | None) -> None:
    if _state.ended:
        os._exit(CODES[signal.Signals(number)])
    now = time.monotonic()
    unwinding = _state.unwinding_since
    if unwinding is not None and (number != signal.SIGINT or now - unwinding < GRACE_S):
        return
    _state.unwinding_since, _state.received = now, number
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated(number)


def _unraisable(failed: sys.UnraisableHookArgs, /) -> None:
    """A signal that met a callback of the garbage collector, where nothing can be raised, is raised a little later."""
    if not issubclass(failed.exc_type, KeyboardInterrupt | Terminated) or _state.received is None:
        sys.__unraisablehook__(failed)
        return
    _state.unwinding_since = None
    signal.signal(signal.SIGALRM, _later)
    signal.setitimer(signal.ITIMER_REAL, LATER_S)


def _later(_number: int, frame: FrameType | None) -> None:
    if _state.received is not None:
        _received(_state.received, frame)
