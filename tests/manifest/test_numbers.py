"""Every number that a file or a budget can hold can be shown, in a few characters."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from layerlens.cli import output
from layerlens.manifest import formats
from layerlens.models import ResourceUse
from layerlens.optimization import feasibility
from layerlens.vocabulary import RESOURCES, prefixed

VALUES = (
    0, 0.0, 1e308, -1e308, 1.7976931348623157e308, 5e-324, -5e-324, 1e-300, math.inf, -math.inf, math.nan, 10**400,
    -(10**400), 2**63, 1e12, 999_999_999_999.5, 1e15, 999.9999, 1e-5,
)  # fmt: skip
FUNCTIONS: list[Callable[[float], str]] = [
    output.scaled, output.significant, output.share, output.gap, formats.number, formats.percent,
    formats.signed_percent,
    *(lambda value, name=name: output.amount(name, value) for name in (*RESOURCES, "tokens", "own_ms")),
    *(lambda value, name=name: formats.quantity(name, value) for name in (*RESOURCES, "own", "")),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: str(value)[:12])
def test_every_number_is_shown_in_a_few_characters(value: float) -> None:
    for function in FUNCTIONS:
        shown = function(value)
        assert 0 < len(shown) <= 32, (function, shown)
    prefixed(value)
    if not isinstance(value, int):
        feasibility._number(value)


def test_ordinary_numbers_are_as_they_were() -> None:
    assert output.amount("trainable_params", 59904) == "59,904"
    assert output.amount("flops", 57.3e6) == "57.3 M"
    assert (output.significant(1e308), output.significant(math.inf)) == ("1e+308", "∞")
    assert formats.quantity("vram_gb", 1e308) == "1×10³⁰⁸ GB"
    assert formats.quantity("flops", 1e308) == "1×10²⁹³ PFLOP"


@pytest.mark.parametrize("budget", [0.0, 5e-324, 1e308])
def test_bars_of_extreme_budgets(budget: float) -> None:
    from layerlens.cli.tables import _bar
    from layerlens.manifest.summary import budget_facts

    use = ResourceUse("vram_gb", budget, base=1.0, added=1e307, total=1e307, multiplier=1e-300, source="predicted")
    assert len(_bar(use).plain) < 80
    assert budget_facts(use)["name"]
    below = ResourceUse("vram_gb", 1.0, base=-1e9, added=0.0, total=-1e9, multiplier=0.0, source="predicted")
    assert len(_bar(below).plain) < 80
