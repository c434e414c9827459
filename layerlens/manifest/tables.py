"""Small tables as plain text and as HTML, for what objects show of themselves in a terminal and in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

Rows = Sequence[Sequence[str]]


def text_table(heads: Sequence[str], rows: Rows, sides: str = "l") -> str:
    """Columns under their heads: flush left where ``sides`` has an ``l`` for them, else flush right.

    >>> print(text_table(["layer", "rank"], [["query", "8"], ["key", "16"]]))
    layer  rank
    query     8
    key      16
    """
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    lines = []
    for row in (heads, *rows):
        cells = zip(row, widths, sides.ljust(len(heads), "r"), strict=True)
        lines.append("  ".join(f"{cell:{'<' if side == 'l' else '>'}{width}}" for cell, width, side in cells).rstrip())
    return "\n".join(lines)


def html_table(heads: Sequence[str], rows: Rows, sides: str = "l", *, caption: str = "") -> str:
    """The same as a ``<table>``, with everything escaped."""

    def line(cells: Sequence[str], tag: str) -> str:
        inside = "".join(
            f'<{tag} style="text-align:{"left" if side == "l" else "right"}">{escape(cell)}</{tag}>'
            for cell, side in zip(cells, sides.ljust(len(heads), "r"), strict=True)
        )
        return f"<tr>{inside}</tr>"

    title = f'<caption style="text-align:left">{escape(caption)}</caption>' if caption else ""
    body = "".join(line(row, "td") for row in rows)
    return f"<table>{title}<thead>{line(heads, 'th')}</thead><tbody>{body}</tbody></table>"
