"""Figures that are written directly: round ticks, data of any size, and elements of XML."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerlens.manifest.plot import MARKS, Plot, ticks_between
from layerlens.registry import METHODS

SVG = "{http://www.w3.org/2000/svg}"
VALUES = st.floats(allow_nan=True, allow_infinity=True)


def plot(**more) -> Plot:
    says = {"x_label": "x < y", "y_label": "y", "x_format": "{:g}".format, "y_format": "{:.3g}".format}
    return Plot(3.6, 2.3, above=0.3, **{**says, **more})


def drawn(figure: Plot) -> ElementTree.Element:
    svg = figure.svg(ink="var(--ink)", rule="var(--rule)", title="a & b", description="c", prefix="p")
    assert svg == figure.svg(ink="var(--ink)", rule="var(--rule)", title="a & b", description="c", prefix="p")
    for places in re.findall(r' (?:d|x|y|transform|viewBox)="([^"]*)"', svg):
        assert "nan" not in places
        assert "inf" not in places
    return ElementTree.fromstring(svg)


def texts(root: ElementTree.Element) -> list[str]:
    return [one.text or "" for one in root.iter(f"{SVG}text")]


@settings(max_examples=60, deadline=None)
@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12), st.integers(4, 9))
def test_ticks_are_round_and_inside(low, span, most):
    high = low + span
    found = ticks_between(low, high, most)
    assert len(found) <= most + 1
    assert all(low - 1e-6 * span <= value <= high + 1e-6 * span for value in found)
    if span > 1e-3 * abs(low):
        assert len(found) >= 2
        steps = [b - a for a, b in pairwise(found)]
        step = steps[0] / 10.0 ** math.floor(math.log10(steps[0]) + 1e-9)
        assert any(step == pytest.approx(nice, rel=1e-4) for nice in (1.0, 2.0, 2.5, 5.0, 10.0))
        assert max(steps) == pytest.approx(min(steps), rel=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(VALUES, VALUES), max_size=5))
def test_any_data_makes_a_figure(points):
    figure = plot()
    x, y = [a for a, _ in points], [b for _, b in points]
    figure.line(x, y, "var(--lora)", mark="o", steps=True, label="a < b")
    figure.band(x, y, y, "var(--lora)", 0.1)
    root = drawn(figure)
    assert "a < b" in texts(root)
    assert root.find(f"{SVG}title").text == "a & b"


def test_ticks_that_would_read_alike_get_more_digits():
    figure = plot()
    figure.line([0, 1], [2.4141, 2.4149], "var(--lora)")
    labels = texts(drawn(figure))
    assert len(set(labels)) == len(labels)


def test_limits_hold_and_marks_are_drawn():
    figure = plot(x_limits=(0.0, None), y_limits=(0.0, 10.0))
    figure.line([10, 20], [5, 5], "red", mark="s")
    figure.point(20, 5, "blue", 6, ring=True)
    figure.upright(10, "green")
    root = drawn(figure)
    assert "0" in texts(root)
    assert "10" in texts(root)
    halfway = 0.5 * (0.3 * 72 + 2.3 * 72 - 36)
    marks = [one.get("transform") for one in root.iter(f"{SVG}path") if one.get("fill") == "red"]
    assert len(marks) == 2
    assert all(f" {halfway:.2f}".rstrip("0").rstrip(".") in place for place in marks)


def test_every_method_has_its_mark():
    assert {method.marker for method in METHODS.values()} <= set(MARKS)
