"""Orders of which every beginning is spread over the whole range."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def evenly(count: int) -> list[int]:
    """0 … count − 1 in an order whose every beginning is spread over the range.

    The bits of 0, 1, 2 … are mirrored (van der Corput 1935).

    >>> evenly(6)
    [0, 4, 2, 1, 5, 3]
    """
    bits = max(1, (count - 1).bit_length())
    mirrored = (int(f"{step:0{bits}b}"[::-1], 2) for step in range(2**bits))
    return [index for index in mirrored if index < count]


def raised_evenly(levels: Sequence[Sequence[int]], fits: Callable[[Sequence[int]], bool]) -> list[int] | None:
    """The highest level that fits, then single groups of it at the next one, spread over the range, where that fits.

    Args:
        levels: of rising demand; each has one number for every group.
        fits: whether such a choice is allowed.

    Returns:
        One number for every group; None where no level fits.
    """
    fitting = [number for number, level in enumerate(levels) if fits(level)]
    if not fitting:
        return None
    chosen = list(levels[fitting[-1]])
    if fitting[-1] + 1 < len(levels):
        for group in evenly(len(chosen)):
            higher = [*chosen[:group], levels[fitting[-1] + 1][group], *chosen[group + 1 :]]
            if fits(higher):
                chosen = higher
    return chosen
