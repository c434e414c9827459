"""What a run read and what became of it: rows, columns, tokens, classes, and one sample as the model sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

MOST_LINES, MOST_CLASSES = 5, 12


@dataclass(frozen=True)
class TokenFigures:
    """Lengths of encoded samples, without padding.

    Args:
        median, longest: tokens of a sample.
        total: tokens of all of them.
        with_loss: tokens that have a loss; None where a loss is not of tokens.
        truncated: samples that are longer than ``data.max_length`` and lost their end.
        cut: rows that are longer and became several samples, so that nothing is lost.
    """

    median: float
    longest: int
    total: int
    with_loss: int | None = None
    truncated: int = 0
    cut: int = 0


@dataclass(frozen=True)
class DataSummary:
    """The data of a run.

    Args:
        source: where it comes from.
        rows: rows of the source.
        samples: of them that can be used.
        used, unused: names of columns.
        left_out: how many rows could not be used, and why, the most frequent reason first.
        notes: what else there is to know of how it was read.
        encoded: samples that ``tokens`` and ``shown`` are of: those that are measured, or trained on.
        tokens: None where the samples are no tokens.
        classes: samples (words of token classification) of each class; empty where there are no classes.
        shown: one sample as the model sees it, by what each part is.
    """

    source: str
    rows: int
    samples: int
    used: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    left_out: tuple[tuple[int, str], ...] = ()
    notes: tuple[str, ...] = ()
    encoded: int = 0
    tokens: TokenFigures | None = None
    classes: Mapping[str, int] = field(default_factory=dict)
    shown: Mapping[str, str] = field(default_factory=dict)

    def facts(self) -> list[tuple[str, str]]:
        """What each line says of the data, and its figures, without the sample."""
        rows = f"{self.rows:,} of {self.source}" if self.source else f"{self.rows:,}"
        found = [("rows", rows if self.samples == self.rows else f"{rows}; {self.samples:,} samples")]
        if self.used or self.unused:
            unused = f"; not used: {', '.join(self.unused)}" if self.unused else ""
            found.append(("columns", f"used: {', '.join(self.used) or 'none'}{unused}"))
        found += [("left out", f"{n:,}: {reason}") for n, reason in self.left_out[:MOST_LINES]]
        if len(self.left_out) > MOST_LINES:
            rest = sum(n for n, _ in self.left_out[MOST_LINES:])
            found.append(("left out", f"{rest:,} for {len(self.left_out) - MOST_LINES} other reasons"))
        if self.tokens is not None:
            found.append(("tokens", self._tokens(self.tokens)))
        if self.classes:
            most = list(self.classes.items())[:MOST_CLASSES]
            more = f" and {len(self.classes) - MOST_CLASSES} more" if len(self.classes) > MOST_CLASSES else ""
            found.append(("classes", ", ".join(f"{name} {count:,}" for name, count in most) + more))
        return [*found, *(("note", note) for note in self.notes)]

    def _tokens(self, tokens: TokenFigures) -> str:
        said = f"median {tokens.median:g}, longest {tokens.longest:,} a sample; {tokens.total:,} in all"
        if tokens.with_loss is not None:
            said += f", {tokens.with_loss / max(1, tokens.total):.0%} of them with loss"
        if tokens.cut:
            said += f"; {tokens.cut:,} longer rows split into several samples"
        lost = f"{tokens.truncated:,} truncated (data.max_length)" if tokens.truncated else "none truncated"
        return f"{said}; {lost} (of {self.encoded:,} samples)"

    def fields(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {**asdict(self), "left_out": [{"rows": n, "reason": reason} for n, reason in self.left_out]}
