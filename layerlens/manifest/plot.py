"""One axes as inline SVG: lines, bands, marks and round ticks, written directly.

A report has up to ten small figures, and a plotting library took most of the time of a small job for them. The figure
is of points (1/72 inch), its colours are CSS variables of the page, and equal data give equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

LEFT, RIGHT, BELOW = 57.6, 10.8, 36.0
"""Room around the axes, in points; measuring labels would need a font."""
FONT = 10.0
LETTER = 0.56 * FONT
"""Width of a letter, about, for the places of a legend's entries."""
ROW = 15.0
MARGIN = 0.05
"""Share of the data's span that is left free at an end without a limit."""
STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
MARKS = {
    "o": "M{r} 0A{r} {r} 0 1 1 -{r} 0A{r} {r} 0 1 1 {r} 0Z",
    "s": "M-{r} -{r}H{r}V{r}H-{r}Z",
    "^": "M0 -{r}L{r} {r}H-{r}Z",
    "v": "M0 {r}L{r} -{r}H-{r}Z",
    "D": "M0 -{r}L{r} 0L0 {r}L-{r} 0Z",
    "h": "M0 -{r}L{r} -{h}V{h}L0 {r}L-{r} {h}V-{h}Z",
    "P": "M-{h} -{r}H{h}V-{h}H{r}V{h}H{h}V{r}H-{h}V{h}H-{r}V-{h}H-{h}Z",
    "X": "M-{r} -{h}L-{h} -{r}L0 -{h}L{h} -{r}L{r} -{h}L{h} 0L{r} {h}L{h} {r}L0 {h}L-{h} {r}L-{r} {h}L-{h} 0Z",
}
"""Marks by matplotlib's names, which methods have: with radius r, and h half of it."""
Format = Callable[[float], str]
Points = Sequence[float]


class Plot:
    """A figure that is drawn at the end, when all its data are there.

    Args:
        width, height: of the figure, inches.
        above: what is left free above the axes, inches.
        x_label, y_label: what stands at the axes.
        x_format, y_format: a tick's value as text.
        x_ticks, y_ticks: at most so many intervals between them.
        x_limits, y_limits: ends of the axes; None where the data say.
    """

    def __init__(
        self, width: float, height: float, *, above: float, x_label: str, y_label: str, x_format: Format,
        y_format: Format, x_ticks: int = 5, y_ticks: int = 5,
        x_limits: tuple[float | None, float | None] = (None, None),
        y_limits: tuple[float | None, float | None] = (None, None),
    ) -> None:  # fmt: skip
        self.width, self.height, self.above = 72.0 * width, 72.0 * height, 72.0 * above
        self.labels, self.formats, self.ticks = (x_label, y_label), (x_format, y_format), (x_ticks, y_ticks)
        self.limits = (x_limits, y_limits)
        self.seen: tuple[list[float], list[float]] = ([], [])
        self.drawn: list[Callable[[_Scale, _Scale], str]] = []
        self.legend: list[tuple[str, str]] = []

    def line(
        self, x: Points, y: Points, colour: str, *, mark: str = "", width: float = 1.8, dashes: str = "",
        steps: bool = False, label: str = "",
    ) -> None:  # fmt: skip
        """A line through points, with a mark at each where one is named; ``steps``: level until the next point."""
        self._see(x, y)
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        style = f'fill="none" stroke="{colour}" stroke-width="{_n(width)}"{dashed}'
        swatch = f'<path d="M0 0H22" {style}/>' + (_mark(mark, 11.0, 0.0, 2.25, f'fill="{colour}"') if mark else "")
        if label:
            self.legend.append((label, swatch))

        def draw(at_x: _Scale, at_y: _Scale) -> str:
            places = [(at_x(a), at_y(b)) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
            path = _path(places, steps)
            marks = "".join(_mark(mark, a, b, 2.25, f'fill="{colour}"') for a, b in places) if mark else ""
            return (f'<path d="{path}" {style}/>' if len(places) > 1 else "") + marks

        self.drawn.append(draw)

    def band(self, x: Points, low: Points, high: Points, colour: str, opacity: float) -> None:
        """What lies between two lines."""
        self._see([*x, *x], [*low, *high])

        def draw(at_x: _Scale, at_y: _Scale) -> str:
            rows = [row for row in zip(x, low, high, strict=True) if all(map(math.isfinite, row))]
            around = [(at_x(a), at_y(b)) for a, b, _ in rows] + [(at_x(a), at_y(c)) for a, _, c in reversed(rows)]
            return f'<path d="{_path(around)}Z" fill="{colour}" fill-opacity="{opacity}"/>' if rows else ""

        self.drawn.append(draw)

    def point(self, x: float, y: float, colour: str, radius: float, *, ring: bool = False) -> None:
        """A dot, or a ring."""
        self._see([x], [y])
        style = f'fill="none" stroke="{colour}" stroke-width="1.6"' if ring else f'fill="{colour}"'
        self.drawn.append(lambda at_x, at_y: _mark("o", at_x(x), at_y(y), radius, style))

    def upright(self, x: float, colour: str) -> None:
        """A dashed line from the bottom to the top."""
        self.seen[0].append(x)
        self.drawn.append(
            lambda at_x, at_y: (
                f'<path d="M{_n(at_x(x))} {_n(at_y.low_at)}V{_n(at_y.high_at)}" fill="none" stroke="{colour}" '
                'stroke-dasharray="4 3"/>'
            )
        )

    def svg(self, *, ink: str, rule: str, title: str, description: str, prefix: str) -> str:
        """The figure as an element of a page.

        Args:
            ink, rule: colours of text and of the grid.
            title, description: what a screen reader says.
            prefix: makes ids unique on the page.
        """
        rows = math.ceil(len(self.legend) / 4)
        top = self.above + max(0, rows - 1) * ROW
        height = self.height + top - self.above
        left, right, bottom = LEFT, self.width - RIGHT, height - BELOW
        x = _Scale(*_ends(self.seen[0], self.limits[0]), left, right)
        y = _Scale(*_ends(self.seen[1], self.limits[1]), bottom, top)
        grid, texts = [], []
        for value, told in _told(ticks_between(x.low, x.high, self.ticks[0]), self.formats[0]):
            at = _n(x(value))
            grid.append(f"M{at} {_n(bottom)}V{_n(top)}M{at} {_n(bottom)}v3.5")
            texts.append(f'<text x="{at}" y="{_n(bottom + 14.6)}" text-anchor="middle">{told}</text>')
        for value, told in _told(ticks_between(y.low, y.high, self.ticks[1]), self.formats[1]):
            at, below = _n(y(value)), _n(y(value) + 3.5)
            grid.append(f"M{_n(left)} {at}H{_n(right)}M{_n(left)} {at}h-3.5")
            texts.append(f'<text x="{_n(left - 7)}" y="{below}" text-anchor="end">{told}</text>')
        x_at, y_at = 0.5 * (left + right), 0.5 * (top + bottom)
        texts.append(f'<text x="{_n(x_at)}" y="{_n(bottom + 29)}" text-anchor="middle">{_t(self.labels[0])}</text>')
        texts.append(
            f'<text transform="translate(12 {_n(y_at)})rotate(-90)" text-anchor="middle">{_t(self.labels[1])}</text>'
        )
        return (
            f'<svg role="img" aria-labelledby="{prefix}-title {prefix}-desc" xmlns="http://www.w3.org/2000/svg" '
            f'viewBox="0 0 {_n(self.width)} {_n(height)}">'
            f'<title id="{prefix}-title">{escape(title)}</title><desc id="{prefix}-desc">{escape(description)}</desc>'
            f'<path d="{"".join(grid)}" fill="none" stroke="{rule}" stroke-width="0.6"/>'
            f'<path d="M{_n(left)} {_n(top)}V{_n(bottom)}H{_n(right)}" fill="none" stroke="{rule}" stroke-width="0.8"/>'
            f'<g stroke-linejoin="round">{"".join(draw(x, y) for draw in self.drawn)}</g>'
            f'<g font-size="{_n(FONT)}" font-family="sans-serif" fill="{ink}">{"".join(texts)}'
            f"{self._legend(right)}</g></svg>"
        )

    def _legend(self, right: float) -> str:
        """Entries above the axes, four in a row, which ends where the axes do."""
        parts = []
        for start in range(0, len(self.legend), 4):
            entries = self.legend[start : start + 4]
            at = right - sum(28.0 + LETTER * len(label) + 14.0 for label, _ in entries)
            y = 10.0 + ROW * (start // 4)
            for label, swatch in entries:
                parts.append(
                    f'<g transform="translate({_n(at)} {_n(y)})">{swatch}<text x="28" y="3.5">{_t(label)}</text></g>'
                )
                at += 28.0 + LETTER * len(label) + 14.0
        return "".join(parts)

    def _see(self, x: Points, y: Points) -> None:
        self.seen[0].extend(value for value in x if math.isfinite(value))
        self.seen[1].extend(value for value in y if math.isfinite(value))


class _Scale:
    """From a value to its place in the figure."""

    def __init__(self, low: float, high: float, low_at: float, high_at: float) -> None:
        self.low, self.high, self.low_at, self.high_at = low, high, low_at, high_at

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        share = (value - self.low) / span if math.isfinite(span) else 0.5  # ends of float64 have no difference
        return self.low_at + (self.high_at - self.low_at) * min(max(share, -10.0), 10.0)


def _ends(seen: Sequence[float], limits: tuple[float | None, float | None]) -> tuple[float, float]:
    """Ends of an axis: the limits, and where there are none the data with a margin."""
    low, high = min(seen, default=0.0), max(seen, default=1.0)
    margin = MARGIN * (high - low)
    low = low - margin if limits[0] is None else limits[0]
    high = high + margin if limits[1] is None else limits[1]
    if not high > low:  # one value alone
        room = MARGIN * abs(low) or MARGIN
        low, high = (low - room if limits[0] is None else low), low + room
    return low, high


def ticks_between(low: float, high: float, most: int) -> list[float]:
    """Round values from ``low`` to ``high``, ``most`` intervals at most: multiples of 1, 2, 2.5 or 5 times 10ⁿ.

    None where the ends are too near or too far for float64.

    >>> ticks_between(0.0, 7.3, 5)
    [0.0, 2.0, 4.0, 6.0]
    """
    span = high - low
    if not (math.isfinite(span) and span / most >= 1e-300):
        return []
    exponent = math.floor(math.log10(span / most))
    exact = next(step for step in STEPS if step * 10.0**exponent >= span / most * (1 - 1e-9))
    step, digits = exact * 10.0**exponent, max(0, 1 - exponent)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, digits) + 0.0 for number in range(first, last + 1)]


def _told(values: Sequence[float], said: Format) -> list[tuple[float, str]]:
    """Each value with its text; with more digits where two would read alike."""
    texts = [_t(said(value)) for value in values]
    if len(set(texts)) < len(texts):
        texts = [_t(f"{value:.7g}") for value in values]
    return list(zip(values, texts, strict=True))


def _path(places: Sequence[tuple[float, float]], steps: bool = False) -> str:
    if not places:
        return ""
    (first_x, first_y), *rest = places
    if steps:
        return f"M{_n(first_x)} {_n(first_y)}" + "".join(f"H{_n(a)}V{_n(b)}" for a, b in rest)
    return f"M{_n(first_x)} {_n(first_y)}" + "".join(f"L{_n(a)} {_n(b)}" for a, b in rest)


def _mark(mark: str, x: float, y: float, radius: float, style: str) -> str:
    path = MARKS.get(mark, MARKS["D"]).replace("{r}", _n(radius)).replace("{h}", _n(radius / 2))
    return f'<path transform="translate({_n(x)} {_n(y)})" d="{path}" {style}/>'


def _n(value: float) -> str:
    """A place with two decimals, as short as it can be written."""
    short = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if short == "-0" else short


def _t(text: str) -> str:
    return escape(text.replace("-", "−") if text[:1] == "-" else text)
