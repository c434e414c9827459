"""Everything that has a name stands on the page where a reader looks for it."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import typer.main

from layerlens import exceptions
from layerlens.cli.main import app
from layerlens.exceptions import LayerLensError
from layerlens.registry import ENGINES, METHODS, STATISTICS, TASKS, UTILITY_MODELS

DOCS = Path(__file__).parents[2] / "docs"
EXCEPTIONS = [
    kind for _, kind in inspect.getmembers(exceptions, inspect.isclass)
    if issubclass(kind, LayerLensError) and kind is not LayerLensError
]  # fmt: skip
ON_PAGES = {
    "concepts/utility.md": list(UTILITY_MODELS),
    "concepts/methods.md": list(METHODS),
    "configuration.md": [*TASKS, *STATISTICS],
    "how-to/my-server.md": list(ENGINES),
    "ERROR_HANDLING.md": [kind.__name__ for kind in EXCEPTIONS],
    "cli.md": list(typer.main.get_command(app).commands),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("page", ON_PAGES)
def test_every_name_stands_on_its_page(page: str):
    text = (DOCS / page).read_text(encoding="utf-8")
    assert [name for name in ON_PAGES[page] if name not in text] == []


@pytest.mark.parametrize("kind", EXCEPTIONS, ids=lambda kind: kind.__name__)
def test_exit_codes_are_those_of_the_page(kind: type[LayerLensError]):
    rows = (DOCS / "ERROR_HANDLING.md").read_text(encoding="utf-8").splitlines()
    (row,) = [row for row in rows if row.startswith(f"| `{kind.__name__}` ")]
    code = row.split("|")[3].strip()
    assert code in (str(kind.exit_code), "its own")
