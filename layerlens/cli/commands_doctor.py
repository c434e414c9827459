"""``doctor``: whether LayerLens can work here, what is missing, and the line that gets it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from layerlens.cli import output
from layerlens.cli.errors import guarded
from layerlens.cli.parameters import Debug, Json

if TYPE_CHECKING:
    from layerlens.cli.machine import Finding

STYLES = {"ok": ("✓", "green"), "hint": ("!", "yellow"), "problem": ("✗", "bold red")}


@guarded()
def doctor(json: Json = False, debug: Debug = False) -> None:
    """Look at Python, packages, kernels, cores, memory and cache; exit code 1 if something must be mended."""
    from layerlens.cli.machine import PROBLEM, examine

    findings = examine()
    if json:
        from dataclasses import asdict

        output.json_result({"findings": [asdict(finding) for finding in findings]})
    else:
        _show(findings)
    if any(finding.status == PROBLEM for finding in findings):
        raise typer.Exit(1)


def _show(findings: list[Finding]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    for finding in findings:
        mark, style = STYLES[finding.status]
        text = Text(finding.found)
        if finding.advice:
            text.append(f"\n→ {finding.advice}", style=style)
        table.add_row(Text(mark, style=style), Text(finding.subject), text)
    output.console().print(table)
