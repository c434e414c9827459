"""From the rows of a source to a data set: odd rows are left out and counted, and nothing is left out silently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.data.labels import by_hand
from layerlens.data.rows import Reading, SourceRows
from layerlens.data.table import Table
from layerlens.exceptions import DataError


def dataset_of(
    found: SourceRows, place: str, config: DataConfig, read: Callable[[Table, DataConfig], Dataset]
) -> Dataset:
    """The samples that a task makes of what was read, without the rows that cannot be used, and what became of each.

    Raises:
        DataError: there are no rows, at least half of them cannot be used, or no column is what the task needs.
    """
    check_rows(found, place)
    table = Table(found.rows, place, found.numbers, whole=found.first is None)
    dataset = read(table, config)
    left_out = {**found.left_out, **{table.number(at): reason for at, reason in table.left_out.items()}}
    _refuse_too_many(left_out, len(found.rows) - len(table.left_out), place)
    unused, notes = table.unused, [*found.notes, *table.notes]
    if table.left_out:
        dataset = read(table.without_left_out(), config)
    parts = {name: part for name, part in table.parts.items() if name in table.used}
    reading = Reading(
        found.total, tuple(table.used), tuple(unused), parts, dict(sorted(left_out.items())), tuple(notes)
    )
    return by_hand(replace(dataset, reading=reading), config.label_names)


def check_rows(found: SourceRows, place: str) -> None:
    """Whether there are rows that can be used, and more than cannot.

    Raises:
        DataError: there are not.
    """
    if not found.rows and not found.left_out:
        raise DataError(f"data.source: {place} has no samples; give one JSON object or CSV record for each sample")
    _refuse_too_many(found.left_out, len(found.rows), place)


def _refuse_too_many(left_out: dict[int, str], n_sound: int, place: str) -> None:
    if left_out and len(left_out) >= n_sound:
        first = min(left_out)
        count = f"; {len(left_out)} of {len(left_out) + n_sound} samples cannot be used" if len(left_out) > 1 else ""
        raise DataError(f"data.source: {place}: sample {first} {left_out[first]}{count}")
