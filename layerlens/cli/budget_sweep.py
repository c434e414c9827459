"""``optimize --budget-sweep``: the same choice under several budgets of one resource, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from layerlens.cli import output
from layerlens.cli.run_summary import as_json
from layerlens.cli.tables import new_table
from layerlens.cli.units import RESOURCE_NAMES, amount, gap
from layerlens.exceptions import ConfigurationError

if TYPE_CHECKING:
    from layerlens.config import RunConfig
    from layerlens.pipeline import RunResult


def sweep_configs(text: str, config: RunConfig) -> list[tuple[float, RunConfig]]:
    """(budget, configuration) for each budget in ``text``, which reads RESOURCE=B1,B2,...

    Every configuration writes to a folder of its own in the configured output directory.

    Raises:
        ConfigurationError: the text does not read like that, or a budget is not allowed.
    """
    from layerlens.config import OptimizationConfig, OutputConfig
    from layerlens.jobs.frontier import BUDGET_FIELDS
    from layerlens.storage import shown

    resource, _, amounts = text.partition("=")
    if resource not in BUDGET_FIELDS or not amounts:
        raise ConfigurationError(
            f"--budget-sweep: got {text!r}; give RESOURCE=B1,B2,... with a resource of {', '.join(BUDGET_FIELDS)}"
        )
    swept = []
    for part in amounts.split(","):
        try:
            budget = float(part)
        except ValueError as error:
            raise ConfigurationError(f"--budget-sweep: {part!r} is not a number") from error
        fields = {**dict(config.optimization), BUDGET_FIELDS[resource]: int(budget) if budget.is_integer() else budget}
        folder = shown(Path(config.output.directory) / f"{resource}-{part.strip()}")
        changed = {"optimization": OptimizationConfig(**fields), "output": OutputConfig(directory=folder)}
        swept.append((budget, config.model_copy(update=changed)))
    return swept


def show_sweep(resource: str, results: Sequence[tuple[float, RunResult]], json: bool, quiet: bool) -> None:
    """One row for each budget, or one JSON value for each."""
    if json:
        output.json_result([{"budget": budget, **as_json(result)} for budget, result in results])
    elif not quiet:
        _print_table(resource, results, output.console())


def _print_table(resource: str, results: Sequence[tuple[float, RunResult]], console: Console) -> None:
    table = new_table(f"Budgets of {RESOURCE_NAMES[resource]}")
    for name in ("budget", "score", "gap", "layers", "parameters"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("written to")
    for budget, result in results:
        rows = result.manifest.allocations
        table.add_row(
            amount(resource, budget),
            f"{result.manifest.score:.6g}",
            gap(result.manifest.gap),
            str(sum(row.method != "none" for row in rows)),
            f"{sum(row.cost for row in rows):,}",
            output.short(result.directory),
        )
    console.print(table)
