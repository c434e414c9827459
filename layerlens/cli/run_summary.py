"""The end of a run: what was chosen, what it uses, how good it is, where the files are, and what to type next."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from layerlens.cli import tables
from layerlens.cli.output import command, short

if TYPE_CHECKING:
    from layerlens.pipeline import RunResult

FILE_MEANINGS = {
    "manifest_json": "the choice, its costs and its proof",
    "manifest_yaml": "the same, for reading",
    "peft": "LoRA adapter directory for PEFT, Trainer, TRL ...",
    "modules": "adapters and prefixes, for layerlens.tuning",
    "report": "report, for a browser",
    "solver_log": "bound and incumbent after every stage of the solver",
    "statistics": "what was measured, for `layerlens optimize`",
}


def show(result: RunResult, console: Console, *, explain: bool = False) -> None:
    """Write the summary of a run for people."""
    manifest = result.manifest
    parts = [tables.chosen(manifest), tables.budgets(manifest.resources), tables.certificate(manifest)]
    told = tables.calibration(manifest.predicted)
    if told is not None:
        parts.append(told)
    if explain:
        parts.append(tables.explanations(result.explanations))
    for part in (*parts, tables.measured(result.measured)):
        if part is not None:
            console.print(part)
            console.print()
    paths = {name: short(path) for name, path in result.files.items()}
    width = max(len(path) for path in paths.values())
    for name in sorted(paths, key=_order):
        console.print(
            Text.assemble(f"  {paths[name]:{width}}  ", (FILE_MEANINGS.get(name, name), "dim")), soft_wrap=True
        )
    console.print()
    console.print(Text(_time(result), style="dim"), soft_wrap=True)
    console.print(Text.assemble("Next: ", (next_command(result), "bold")), soft_wrap=True)


def next_command(result: RunResult) -> str:
    """The command to type after a run: see how to train; after ``optimize``, write the adapter first."""
    manifest = short(result.files["manifest_json"])
    if "peft" in result.files or "modules" in result.files:
        return command("apply", manifest)
    return command("apply", manifest, "--output", short(result.directory))


def as_json(result: RunResult) -> dict[str, Any]:
    """The result of a run as JSON values."""
    manifest, written = result.manifest, result.manifest.fields()
    return {
        "directory": result.directory,
        "files": result.files,
        "allocations": written["allocations"],
        "resources": written["resources"],
        "score": manifest.score,
        "upper_bound": manifest.upper_bound,
        "gap": manifest.gap,
        "status": manifest.status,
        "solver": manifest.solver,
        "predicted": written["predicted"],
        "measured": result.measured,
        "explanations": [asdict(explanation) for explanation in result.explanations],
        "statistics_from_cache": result.statistics_from_cache,
        "seconds": result.seconds,
        "warnings": list(result.warnings),
    }


def _order(name: str) -> int:
    known = list(FILE_MEANINGS)
    return known.index(name) if name in known else len(known)


def _time(result: RunResult) -> str:
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.seconds.items())
    cached = "; statistics taken from the cache" if result.statistics_from_cache and "profile" in result.seconds else ""
    return f"{sum(result.seconds.values()):.1f} s ({stages}){cached}"
