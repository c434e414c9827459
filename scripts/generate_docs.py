"""Writes docs/configuration.md and docs/cli.md from the code, so that they say what it does.

python scripts/generate_docs.py          write it
python scripts/generate_docs.py --check  fail if it is not current (a test does this)
"""

from __future__ import annotations

import re
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.cli import get_docs_for_click
from typer.main import get_command

from layerlens.cli.main import app
from layerlens.config.base import ConfigModel, RegisteredName
from layerlens.config.example import example_config, short_config, yaml_value
from layerlens.config.schema import alternatives, as_model, default_of, summary
from layerlens.config.sections import RunConfig
from layerlens.registry import TASKS

DOCS = Path(__file__).resolve().parents[1] / "docs"

INTRODUCTION = """\
# Configuration

<!-- Made by scripts/generate_docs.py from the sections in layerlens/config; change it there. -->

One YAML file describes a job. `layerlens init` writes a commented file to start from, `layerlens validate FILE` checks
it without running it, and `layerlens run FILE` runs it. `layerlens schema` prints the JSON Schema for editors.

- Relative paths start from the folder of the configuration file. `--output` starts from the working directory.
- `--set section.key=value` replaces a setting for one run. The value is YAML, such as
  `--set 'optimization.lora_ranks=[4, 8]'`.
- LayerLens reads YAML 1.2: `1e9` and `1e-4` are numbers, `yes` is text. You can write whole numbers as `50_000` or
  `5e4`, and budgets with a unit: `300k`, `1.5M`, `2B` (counts), `8GB`, `512MB`, `8GiB` (memory), `20ms`, `0.5s` (time).
- LayerLens refuses unknown and duplicate keys, and lists all problems of a file at once, with line and column:

  ```
  config.yaml:5:13: optimization.max_vram: unknown key, did you mean 'max_vram_gb'?
  ```
"""

RULES = {"gt": "> {}", "ge": "≥ {}", "lt": "< {}", "le": "≤ {}", "min_length": "not empty"}


def main() -> int:
    """Write the pages, or with --check say which are not current."""
    pages = {DOCS / "configuration.md": configuration_page(), DOCS / "cli.md": cli_page()}
    if "--check" not in sys.argv[1:]:
        for path, page in pages.items():
            path.write_text(page, encoding="utf-8")
        return 0
    stale = [path for path, page in pages.items() if not path.is_file() or path.read_text(encoding="utf-8") != page]
    for path in stale:
        print(f"docs/{path.name} is not current; run: python scripts/generate_docs.py", file=sys.stderr)
    return 1 if stale else 0


def cli_page() -> str:
    """docs/cli.md, by Typer's own generator."""
    command: Any = get_command(app)
    with command.make_context("layerlens", ["--help"], resilient_parsing=True) as context:
        text = get_docs_for_click(obj=command, ctx=context, name="layerlens")
    # The help text of shell completion differs if the generator runs in an unknown shell.
    lines = [line for line in text.splitlines() if not re.match(r"\* `--(install|show)-completion`", line)]
    return (
        "# Command line\n\n<!-- Made by scripts/generate_docs.py from layerlens/cli; change it there. -->\n\n"
        "Tables and progress go to stderr; results (`--json`) go to stdout. "
        "[Exit codes](ERROR_HANDLING.md#exit-codes) are the same for every command.\n\n"
        + "\n".join(lines)
        .replace("\n# `layerlens`\n", "\n## `layerlens`\n")
        .lstrip("\n")
        .removeprefix("# `layerlens`\n\n")
        + "\n"
    )


def configuration_page() -> str:
    """docs/configuration.md."""
    parts = [INTRODUCTION]
    for name, known in RunConfig.model_fields.items():
        parts += _section(known, (name,))
    parts.append(_tasks())
    parts.append(f"## Example\n\nWhat `layerlens init` writes:\n\n```yaml\n{short_config({})}```\n")
    parts.append(f"## Every key\n\nWhat `layerlens init --full` writes:\n\n```yaml\n{example_config()}```\n")
    return "\n".join(parts)


def _tasks() -> str:
    """A table of what each task is."""
    rows = [f"| `{task.name}` | {task.description} | {' or '.join(task.metrics.primary)} |" for task in TASKS.values()]
    return "\n".join(["## Tasks\n", "| `model.task` | samples | main metric |", "|---|---|---|", *rows]) + "\n"


def _section(known: FieldInfo, path: tuple[str, ...], entry: str = "") -> Iterator[str]:
    section = as_model(known.annotation) or _entry_model(known.annotation)
    assert section is not None, f"{'.'.join(path)} is not a section"
    yield f"{'#' * (len(path) + 1)} `{'.'.join(path)}{entry}`\n\n{_text(section)}\n"
    inner = {name: field for name, field in section.model_fields.items() if as_model(field.annotation)}
    rows = [_row(name, field) for name, field in section.model_fields.items() if name not in inner]
    yield "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows]) + "\n"
    for name, field in inner.items():
        yield from _section(field, (*path, name))
    for name, field in section.model_fields.items():
        if _entry_model(field.annotation):
            yield from _section(field, (*path, name), "[]" if typing.get_origin(field.annotation) is tuple else ".NAME")


def _entry_model(annotation: Any) -> type[ConfigModel] | None:
    """The model of each entry, where a list or mapping has sections as entries."""
    place = {tuple: 0, dict: 1}.get(typing.get_origin(annotation))
    return None if place is None else as_model(typing.get_args(annotation)[place])


def _text(section: type[ConfigModel]) -> str:
    """The section's whole docstring, its lines joined to paragraphs."""
    paragraphs = (section.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs) or summary(section)


def _row(name: str, known: FieldInfo) -> str:
    default = default_of(known)
    if default is PydanticUndefined:
        shown = "**required**"
    else:
        shown = "not set" if default is None else f"`{yaml_value(default)}`"
    names = [name for rule in known.metadata if isinstance(rule, RegisteredName) for name in rule.names]
    kind = f"{_listed(names) or _type(known.annotation)}{_limits(known)}".replace("|", "\\|")
    meaning = (known.description or "").replace("|", "\\|")
    return f"| `{name}` | {kind} | {shown} | {meaning} |"


def _type(annotation: Any) -> str:
    """An annotation in the words of YAML."""
    kinds = [kind for kind in alternatives(annotation) if kind is not type(None)]
    if len(kinds) > 1:
        return " or ".join(_type(kind) for kind in kinds)
    kind = kinds[0]
    if as_model(kind):
        return "sections (below)"
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _listed(arguments[1].names)
    if origin is typing.Literal:
        return _listed(arguments)
    if origin in (tuple, list):
        return f"list of {_type(arguments[0]).replace('number', 'numbers')}"
    if origin is dict:
        return "mapping" if arguments[1] is Any else f"mapping to {_type(arguments[1])}"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}[kind]


def _listed(names: Sequence[Any]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _limits(known: FieldInfo) -> str:
    rules = [
        RULES[rule].format(getattr(limit, rule))
        for limit in known.metadata
        for rule in RULES
        if getattr(limit, rule, None) is not None
    ]
    return f", {', '.join(rules)}" if rules else ""


if __name__ == "__main__":
    sys.exit(main())
