"""A piece of code that a reader can copy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How another program uses a choice.

    Args:
        name: the program.
        code: to copy whole; paths in it start from the directory of the manifest.
        note: a sentence on when and where it runs; "" where there is nothing to say.
    """

    name: str
    code: str
    note: str = ""
