"""Fills the templates of the report and of what a notebook shows; everything that is put in is escaped.

The one script of the report is in ``report.js``. The page allows it by its hash, so that nothing else can run there.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

TEMPLATES = Path(__file__).parent / "templates"


@cache
def report_script() -> str:
    """The script of the report, as it stands between its tags."""
    return (TEMPLATES / "report.js").read_text(encoding="utf-8")


def script_hash(script: str) -> str:
    """What a Content-Security-Policy calls a script: ``sha256-...``."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def rendered(template: str, **values: Any) -> str:
    """A template of the folder ``templates`` with these values."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    """The templates, each compiled once in a process."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    return environment


def _breakable(name: str) -> Markup:
    """A module path that may break after its dots, which is where a reader expects it."""
    return Markup(".<wbr>").join(escape(part) for part in name.split("."))
