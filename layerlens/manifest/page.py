"""Fills the templates of the report and of what a notebook shows; everything that is put in is escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape


def rendered(template: str, **values: Any) -> str:
    """A template of the folder ``templates`` with these values."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    return environment.get_template(template).render(**values)


def _breakable(name: str) -> Markup:
    """A module path that may break after its dots, which is where a reader expects it."""
    return Markup(".<wbr>").join(escape(part) for part in name.split("."))
