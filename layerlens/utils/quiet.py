"""torch's C++ parts write lines for their own developers to stderr, which no Python filter sees: these go off."""

from __future__ import annotations

import os

ABOVE_ALL = "99"


def quiet_profiler() -> None:
    """No lines of torch's profiler about its start and stop; read when it is first used."""
    os.environ.setdefault("KINETO_LOG_LEVEL", ABOVE_ALL)


def quiet_torch() -> None:
    """No warnings of torch's C++ parts either; read when torch is imported, so for programs of ours alone."""
    quiet_profiler()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
