"""Doing something that talks to the network, but waiting for it only so long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

LONGEST_WAIT_S = 0.8
"""How long one job waits at its end for everything that telemetry sends, all together."""


class Deadline:
    """A moment until which several sendings may take, all together."""

    def __init__(self, seconds: float = LONGEST_WAIT_S) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())


def within(deadline: Deadline, send: Callable[[], None]) -> str:
    """Run ``send`` in a thread that may outlive us; "" when it was done in time, else why not, in a line."""
    failure: list[str] = []
    done = threading.Event()

    def work() -> None:
        try:
            send()
        except Exception as error:  # every transport has its own
            failure.append(next(iter(str(error).splitlines()), "") or type(error).__name__)
        finally:
            done.set()

    threading.Thread(target=work, name="layerlens-telemetry", daemon=True).start()
    if not done.wait(deadline.left()):
        return "no answer in time"
    return failure[0] if failure else ""
