"""The rows of a source, and what reading them told: how many there are, which were left out and why.

A reader asks ``wanted`` for every row that it comes to and ``add``s those that are; where the first rows are enough,
the last of them ends it by ``Enough``. Of a source that is larger than may be kept, half of the rows are dropped each
time it is full: a draw by their places, the same in every run, since every second one might be of one class.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

LINE = re.compile(r"\(line [^)]*\) |byte [\d,]+ .*")
"""What differs between reasons of one kind."""
Rows = list[dict[str, Any]]
MASK = 2**64 - 1
FIRST = 1000
"""Rows that say what a source is like: which column has labels, and which task it is for."""
MOST_NAMED = 4
"""Names of files in one message."""
MOST_BYTES = 2**29
"""Of a source, as it is stored, that are kept in memory where ``data.max_rows`` says nothing."""


class Enough(Exception):
    """The first rows that were asked for are read."""


@dataclass
class SourceRows:
    """What was read of one source.

    Args:
        max_rows: most rows that are kept; None for as many as ``max_bytes`` hold.
        max_bytes: most bytes of the stored source whose rows are kept.
        first: rows after which reading ends; None for all.
        rows: those kept.
        numbers: the place of each in the source, counted from 1.
        left_out: the place of each row that cannot be used, with the reason.
        notes: what else the user should know, a line each.
        total: rows of the source.
    """

    max_rows: int | None = None
    max_bytes: int = MOST_BYTES
    first: int | None = None
    rows: Rows = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    left_out: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    total: int = 0
    _step: int = 1
    _bytes: float = 0.0

    def wanted(self) -> bool:
        """Count the next row; whether it is one of those to be kept."""
        self.total += 1
        return _drawn(self.total, self._step)

    def add(self, row: dict[str, Any], n_bytes: int = 0) -> None:
        """Keep the row that was counted last, which takes so many bytes in the source.

        Raises:
            Enough: it is the last one that was asked for.
        """
        self.rows.append(row)
        self.numbers.append(self.total)
        if len(self.rows) == self.first:
            raise Enough
        self._bytes += n_bytes
        full = self._bytes > self.max_bytes if self.max_rows is None else len(self.rows) >= 2 * self.max_rows
        if full and len(self.rows) > 1:
            self._step *= 2
            kept = [place for place, number in enumerate(self.numbers) if _drawn(number, self._step)]
            self._bytes *= len(kept) / len(self.rows)
            self.rows, self.numbers = [self.rows[place] for place in kept], [self.numbers[place] for place in kept]

    def leave_out(self, reason: str) -> None:
        """The row that was counted last cannot be used."""
        self.left_out[self.total] = reason

    def note(self, line: str) -> None:
        """What the user should know, once."""
        if line not in self.notes:
            self.notes.append(line)

    def finished(self) -> SourceRows:
        """The same with no more than ``max_rows``, and a note where some of the source was not kept."""
        n = len(self.rows)
        if self.max_rows is not None and n > self.max_rows:
            kept = drawn_places(n, self.max_rows)
            self.rows, self.numbers = [self.rows[place] for place in kept], [self.numbers[place] for place in kept]
        if len(self.rows) + len(self.left_out) < self.total:
            limit = f"{self.max_bytes / 2**20:.0f} MB" if self.max_rows is None else f"{self.max_rows:,} rows"
            self.note(
                f"{len(self.rows):,} of {self.total:,} rows were drawn, so that {limit} are in memory (data.max_rows)"
            )
        return self

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]], first: int | None = None) -> SourceRows:
        """Rows that are in memory already."""
        found = [dict(row) for row in rows]
        return cls(rows=found, numbers=list(range(1, len(found) + 1)), total=len(found), first=first)


def drawn_places(total: int, n: int) -> list[int]:
    """``n`` of so many places, in their order; the same in every run."""
    return sorted(random.Random(0).sample(range(total), n))


def _drawn(number: int, one_of: int) -> bool:
    """Whether a row is of the share 1 / ``one_of`` (a power of two) that is kept, which is part of every larger share.

    MurmurHash3's finaliser mixes the bits of its place.
    """
    if one_of == 1:
        return True
    mixed = number & MASK
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        mixed = ((mixed ^ (mixed >> 33)) * factor) & MASK
    return (mixed ^ (mixed >> 33)) % one_of == 0


@dataclass(frozen=True)
class Reading:
    """What was read to make a data set.

    Args:
        total: rows of the source.
        used, unused: names of its columns.
        parts: of those that are used, by name, what they were taken for, if it is given by a key of ``data``.
        left_out: the place of each row that could not be used, with the reason.
        notes: what else the user should know.
        names: what the user calls rows that are left out, if that is more than a number: files.
    """

    total: int
    used: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    parts: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    names: Mapping[int, str] = field(default_factory=dict)

    @property
    def columns(self) -> str:
        """Which columns were taken, for what, and which were not read."""
        used = [f"{self.parts[name]} from {name!r}" if name in self.parts else repr(name) for name in self.used]
        return "; not read: ".join(filter(None, (", ".join(used), ", ".join(self.unused))))

    @property
    def reasons(self) -> list[tuple[int, str]]:
        """How many rows were left out and why, the most frequent reason first, with the first row that has it.

        Of rows with names the first ones are named.
        """
        counted: Counter[str] = Counter()
        of_kind: dict[str, list[int]] = {}
        for number, reason in sorted(self.left_out.items()):
            kind = LINE.sub("", reason).partition(", got ")[0]
            counted[kind] += 1
            of_kind.setdefault(kind, []).append(number)
        return [(n, self._said(of_kind[kind])) for kind, n in counted.most_common()]

    def _said(self, numbers: list[int]) -> str:
        reason, names = self.left_out[numbers[0]], [self.names[number] for number in numbers if number in self.names]
        if not names:
            return f"sample {numbers[0]} {reason}"
        more = f" (and {len(names) - MOST_NAMED} more)" if len(names) > MOST_NAMED else ""
        return f"{', '.join(names[:MOST_NAMED])}{more} {reason}"
