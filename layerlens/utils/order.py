"""Orders of which every beginning is spread over the whole range."""

from __future__ import annotations


def evenly(count: int) -> list[int]:
    """0 … count − 1 in an order whose every beginning is spread over the range.

    The bits of 0, 1, 2 … are mirrored (van der Corput 1935).

    >>> evenly(6)
    [0, 4, 2, 1, 5, 3]
    """
    bits = max(1, (count - 1).bit_length())
    mirrored = (int(f"{step:0{bits}b}"[::-1], 2) for step in range(2**bits))
    return [index for index in mirrored if index < count]
