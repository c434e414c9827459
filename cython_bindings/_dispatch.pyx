"""The instruction set that the kernels use, chosen once per process, and the thread count they may use.

The choice lives here and nowhere else: the other kernel modules ask `active_isa` (C level) on each call and pass the
answer down. ``LAYERLENS_ISA=scalar|avx2|avx512`` forces one; it is read when a kernel is first used.
"""

import operator
import os

from layerlens.exceptions import ConfigurationError

ENVIRONMENT_VARIABLE = "LAYERLENS_ISA"

cdef int _active = -1

watch_forks()


cdef str _name(int isa):
    return isa_name(<Isa>isa).decode("ascii")


cdef int _named(str wanted, str origin) except -1:
    cdef int index
    for index in range(isa_count):
        if _name(index) != wanted:
            continue
        if isa_available(<Isa>index):
            return index
        raise ConfigurationError(
            f"{origin}={wanted!r}: this machine or this build cannot run {wanted} kernels; "
            f"available: {', '.join(available_isas())}"
        )
    raise ConfigurationError(
        f"{origin}={wanted!r} names no instruction set; available here: {', '.join(available_isas())}"
    )


cdef int active_isa() except -1:
    global _active
    cdef str wanted
    if _active < 0:
        wanted = os.environ.get(ENVIRONMENT_VARIABLE, "").strip().lower()
        _active = _named(wanted, ENVIRONMENT_VARIABLE) if wanted else <int>best_isa()
    return _active


cdef int usable_threads(object threads) except -1:
    cdef Py_ssize_t count
    try:
        count = operator.index(threads)
    except TypeError:
        raise TypeError(f"threads must be an integer, got {type(threads).__name__}") from None
    if not 1 <= count <= 4096:
        raise ValueError(f"threads must be between 1 and 4096, got {count}")
    return 1 if in_forked_child() else <int>count


def isa() -> str:
    """Name of the instruction set in use: "scalar", "avx2" or "avx512".

    Raises ConfigurationError (a ValueError) if ``LAYERLENS_ISA`` names one that is unknown or cannot run here.
    """
    return _name(active_isa())


def available_isas() -> tuple[str, ...]:
    """Names that ``LAYERLENS_ISA`` may have on this machine, slowest first.

    >>> available_isas()[0]
    'scalar'
    """
    cdef int index
    return tuple([_name(index) for index in range(isa_count) if isa_available(<Isa>index)])


def _force(name: str | None) -> None:
    """For tests: use this instruction set from now on; None goes back to LAYERLENS_ISA or the best."""
    global _active
    _active = -1 if name is None else _named(name, "isa")


def _serial_because_forked() -> bool:
    """For tests: whether this process is a forked child, in which every kernel runs on one thread."""
    return in_forked_child()
