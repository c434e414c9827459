"""Everything that has a name stands on the page where a reader looks for it."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest
import typer.main

from layerlens import exceptions
from layerlens.cli.main import app
from layerlens.exceptions import LayerLensError
from layerlens.registry import ENGINES, METHODS, STATISTICS, TASKS, UTILITY_MODELS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NOT_WRITTEN = (
    "who wants to know", "checked by practice", "told of", "with several give", "DESIGN section", "of one's own",
    "sign of life", "as they were drawn", "held against",
)  # fmt: skip
"""Wordings that docs/style.md replaces."""
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
TOGETHER = ("all", "test", "dev")
"""Extras that put others together, with tools of developers."""


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


def test_every_dependency_stands_on_its_page_and_no_other():
    """The first two tables of the page are the core and the extras of pyproject.toml."""
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {
        extra: {re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0] for requirement in needed} - {"layerlens"}
        for extra, needed in {"": project["dependencies"], **project["optional-dependencies"]}.items()
        if extra not in TOGETHER
    }
    _, core, extras, *_ = (DOCS / "dependencies.md").read_text(encoding="utf-8").split("\n## ")
    told: dict[str, set[str]] = {}
    for line in core.splitlines()[4:]:
        if line.startswith("| "):
            told.setdefault("", set()).update(line.split("|")[1].strip().split(", "))
    for line in extras.splitlines():
        if line.startswith("| `"):
            _, named, packages, *_ = line.split("|")
            for extra in re.findall("`(.+?)`", named):
                told.setdefault(extra, set()).update(packages.strip().split(", "))
    assert told == wanted
    assert all(f"`{extra}`" in extras for extra in TOGETHER)


def test_wordings_of_the_style_page_are_not_written():
    pages = [ROOT / "README.md", *(page for page in DOCS.rglob("*.md") if page.parent.name != "decisions")]
    read = [*pages, *(ROOT / "layerlens").rglob("*.py"), *(ROOT / "layerlens").rglob("*.j2")]
    texts = {path: " ".join(path.read_text(encoding="utf-8").split()) for path in read if path.name != "style.md"}
    found = [
        (str(path.relative_to(ROOT)), words) for path, text in texts.items() for words in NOT_WRITTEN if words in text
    ]
    assert found == []


def test_the_readme_is_short_and_shows_a_picture():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert "](docs/assets/choice.svg)" in "".join(text.splitlines(keepends=True)[:20])
