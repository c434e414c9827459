"""``evaluate``: fine-tunes under several allocations, paired, and what they say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from layerlens.cli import output
from layerlens.cli.commands_run import do, load
from layerlens.cli.places import base_dir_of

if TYPE_CHECKING:
    from layerlens.evaluation.from_config import StudyResult


def evaluate_study(
    config: Path, directory: Path | None, settings: list[str] | None, *, json: bool, quiet: bool
) -> None:
    """Train several allocations with tuned learning rates on paired seeds, and tell which wins on the data."""
    checked = load(config, settings, directory)
    from layerlens.evaluation.from_config import evaluate_config

    result = do(
        lambda progress, warn: evaluate_config(checked, base_dir=base_dir_of(config), progress=progress, warn=warn),
        quiet,
    )
    if json:
        from dataclasses import asdict

        output.json_result(asdict(result))
    elif not quiet:
        _show(result)


def _show(result: StudyResult) -> None:
    from layerlens.cli.tables import new_table

    console = output.console()
    for budget in dict.fromkeys(row["budget"] for row in result.arms):
        rows = sorted((row for row in result.arms if row["budget"] == budget), key=lambda row: row["test_loss"])
        table = new_table(f"Budget {budget}")
        for name in ("arm", "parameters", "learning rate", "test loss", "right"):
            table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
        for row in rows:
            table.add_row(
                row["arm"], f"{row['params']:,}", f"{row['learning_rate']:g}", f"{row['test_loss']:.4f}",
                f"{row['test_metric']:.1%}",
            )  # fmt: skip
        console.print(table)
    for path in result.files.values():
        console.print(f"  {output.short(path)}", soft_wrap=True)
