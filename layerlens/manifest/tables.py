"""Small tables as plain text and as HTML, for what objects show of themselves in a terminal and in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

Rows = Sequence[Sequence[str]]


def text_table(heads: Sequence[str], rows: Rows, *, left: int = 1) -> str:
    """Columns under their heads; the first ``left`` are flush left, the others flush right.

    >>> print(text_table(["layer", "rank"], [["query", "8"], ["key", "16"]]))
    layer  rank
    query     8
    key      16
    """
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    lines = []
    for row in (heads, *rows):
        cells = [cell.ljust(width) if column < left else cell.rjust(width) for column, (cell, width) in
                 enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def html_table(heads: Sequence[str], rows: Rows, *, left: int = 1, caption: str = "") -> str:
    """The same as a ``<table>``, with everything escaped."""

    def line(cells: Sequence[str], tag: str) -> str:
        sides = ("left" if column < left else "right" for column in range(len(cells)))
        inside = "".join(
            f'<{tag} style="text-align:{side}">{escape(cell)}</{tag}>' for cell, side in zip(cells, sides, strict=True)
        )
        return f"<tr>{inside}</tr>"

    title = f'<caption style="text-align:left">{escape(caption)}</caption>' if caption else ""
    body = "".join(line(row, "td") for row in rows)
    return f"<table>{title}<thead>{line(heads, 'th')}</thead><tbody>{body}</tbody></table>"
