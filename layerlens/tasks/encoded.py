"""Encoded samples with what became of the rows that they were made from, so that nothing is cut without a word."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

from layerlens.tasks.batches import LENGTH
from layerlens.tasks.losses import IGNORED


class Encoded(list[dict[str, Any]]):
    """Samples for the model, of ``rows`` rows.

    Attributes:
        rows: how many rows were encoded.
        limit: ``data.max_length``.
        cut: rows that were longer and became several samples.
        truncated: rows that were longer and lost their end.
        left_out: rows that cannot be used, by reason.
        said: what else the user should know.
        made: how many samples there were before these were taken of them; 0 where these are all.
    """

    def __init__(self, rows: int, limit: int) -> None:
        super().__init__()
        self.rows, self.limit = rows, limit
        self.cut = self.truncated = self.made = 0
        self.left_out: Counter[str] = Counter()
        self.said: dict[str, None] = {}

    @property
    def notes(self) -> list[str]:
        """What the user should know, a line each."""
        lines = [f"data: {line}" for line in self.said]
        lines += [f"data: left out {n} of {self.rows} rows: {reason}" for reason, n in self.left_out.items()]
        longer = f"of {self.rows} rows are longer than data.max_length ({self.limit} tokens)"
        if self.cut:
            lines.append(f"data: {self.cut} {longer}; they are split into {self.made or len(self)} samples")
        if self.made:
            lines.append(f"data: {len(self)} of {self.made} samples are used, spread evenly")
        if self.truncated:
            lines.append(f"data: {self.truncated} {longer} and are truncated; raise it to keep their ends")
        return lines

    def spread(self, limit: int | None) -> Encoded:
        """At most so many of the samples, spread evenly."""
        if limit is None or limit >= len(self):
            return self
        chosen = self.like()
        chosen.extend(self[index * len(self) // limit] for index in range(limit))
        chosen.made = self.made or len(self)
        return chosen

    def like(self) -> Encoded:
        """None of the samples, with all that became of the rows."""
        empty = Encoded(self.rows, self.limit)
        empty.cut, empty.truncated, empty.made = self.cut, self.truncated, self.made
        empty.left_out, empty.said = Counter(self.left_out), dict(self.said)
        return empty


def notes_of(features: Any) -> list[str]:
    """What the user should know of encoded samples."""
    return features.notes if isinstance(features, Encoded) else []


def tokens_digest(features: Any) -> str:
    """SHA-256 over token ids (or lengths of clips) and labels; "" where samples are something else."""
    digest = hashlib.sha256()
    for one in features:
        if "input_ids" not in one and LENGTH not in one:
            return ""
        for name, value in sorted(one.items()):
            value = value.tolist() if hasattr(value, "tolist") else value
            if isinstance(value, (list, int, float)):
                digest.update(f"{name}={value};".encode())
    return digest.hexdigest()


def completion(ids: list[int], start: int) -> list[int]:
    """Labels of a sample whose loss begins at ``start``."""
    return [IGNORED] * min(start, len(ids)) + ids[start:]


def common_prefix(one: list[int], other: list[int]) -> int:
    """How many tokens two sequences share at their beginning."""
    shortest = min(len(one), len(other))
    return next((n for n in range(shortest) if one[n] != other[n]), shortest)
