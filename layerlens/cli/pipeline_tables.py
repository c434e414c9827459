"""The end of ``layerlens pipeline``: the time of every step, tokens, reports, and where the files are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from layerlens.cli.output import short, significant
from layerlens.cli.tables import new_table
from layerlens.vision_language.results import STEPS

if TYPE_CHECKING:
    from layerlens.jobs.vision_language import VisionLanguageResult

SHOWN_REPORTS = 4


def show(result: VisionLanguageResult, console: Console) -> None:
    """Write the summary for people."""
    summary = result.summary
    for item in result.items[:SHOWN_REPORTS]:
        outcome = item.latest(summary["primary"])
        if outcome is not None:
            words = outcome.report or f"failed: {outcome.reason}"
            console.print(Text.assemble((f"{item.path.name}: ", "bold"), words), soft_wrap=True)
            for line in _wrong(outcome.check or {}):
                console.print(Text(f"  {line}", style="yellow"), soft_wrap=True)
    if len(result.items) > SHOWN_REPORTS:
        console.print(Text(f"... and {len(result.items) - SHOWN_REPORTS} more", style="dim"))
    console.print()
    for variant in summary["variants"]:
        if variant["steady"]["passes"]:
            console.print(timings(variant))
            console.print(Text(_notes(variant), style="dim"), soft_wrap=True)
            console.print()
    if len(summary["variants"]) > 1:
        console.print(_compared(summary["variants"]))
        console.print()
    models = summary["models"][summary["primary"]]
    console.print(Text(f"Detector: {models['detector']['source']} ({models['detector']['software']})", style="dim"))
    console.print(
        Text(f"Language model: {models['llm']['name']} ({models['llm']['kind']})", style="dim"), soft_wrap=True
    )
    where = summary["environment"]
    conditions = f"{where['threads']} threads, batches of {where['batch_size']}, load {where['load_average']}"
    console.print(Text(f"{where['device']}, {conditions}", style="dim"), soft_wrap=True)
    for path in result.files.values():
        console.print(Text(f"  {short(path)}"), soft_wrap=True)


def _wrong(check: Mapping[str, Any]) -> list[str]:
    """What the check of a report found, a line each."""
    lines = [f'wrong: "{one["text"]}": {"; ".join(one["faults"])}' for one in check.get("sentences", ())]
    missing = [*check.get("left_out", ()), *check.get("missing", ())]
    return [*lines, f"not mentioned in the report: {'; '.join(missing)}"] if missing else lines


def timings(variant: Mapping[str, Any]) -> Table:
    """Every step of one variant's measured passes, in milliseconds, with the warm-up's mean beside it."""
    steady, warmup = variant["steady"], variant["warmup"]
    table = new_table(f"Time per image, {variant['variant']} ({steady['passes']} passes, ms)")
    table.add_column("step")
    for name in ("mean", "p50", "p95", "warm-up"):
        table.add_column(name, justify="right", no_wrap=True)
    for step, figures in steady["steps_ms"].items():
        table.add_row(STEPS[step], *_cells(figures), _mean(warmup["steps_ms"].get(step)))
    table.add_row("unattributed", *_cells(steady["unattributed_ms"]), _mean(warmup["unattributed_ms"]))
    table.add_section()
    for words, key in (
        ("total", "total_ms"),
        ("time to first token", "time_to_first_token_ms"),
        ("per token", "per_token_ms"),
        ("per chunk of tokens", "per_chunk_ms"),
    ):
        if steady[key]:
            table.add_row(words, *_cells(steady[key]), _mean(warmup[key]))
    return table


def _notes(variant: Mapping[str, Any]) -> str:
    steady, tokens = variant["steady"], variant["tokens"]
    parts = [f"{variant['done']} of {variant['images']} images done, {variant['detections']} detections"]
    if variant["without_findings"]:
        parts.append(f"{variant['without_findings']} without findings (language model not asked)")
    if variant["reports_checked"]:
        checked = variant["reports_checked"]
        parts.append(f"{checked - variant['reports_wrong']} of {checked} reports agree with the boxes")
    parts.append(f"{tokens['prompt']} + {tokens['completion']} tokens")
    if steady["tokens_per_s"]:
        parts.append(f"{significant(steady['tokens_per_s'])} tokens/s")
    parts.append(f"unattributed {100 * (steady['unattributed_share'] or 0):.2f} %")
    communication = steady["communication"]
    if communication:
        if communication["ms"]:
            value = f"{significant(communication['ms']['p50'])} ms"
        else:
            low, high = communication["lower_ms"]["p50"], communication["upper_ms"]["p50"]
            value = f"{significant(low)} to {significant(high)} ms"
        parts.append(f"communication {value} ({communication['method']}: {communication['note']})")
    return "; ".join(parts)


def _compared(variants: list[Mapping[str, Any]]) -> Table:
    """Medians of the variants side by side, as ratios to the first."""
    table = new_table("Before and after adaptation (medians)")
    table.add_column("")
    for variant in variants:
        table.add_column(variant["variant"], justify="right", no_wrap=True)
    rows = {
        "detector inference": lambda timing: timing["steps_ms"].get("detect"),
        "per token": lambda timing: timing["per_token_ms"],
        "total": lambda timing: timing["total_ms"],
    }
    for words, find in rows.items():
        figures = [find(variant["steady"]) for variant in variants]
        first = figures[0]
        if first is None:
            continue
        cells = [
            "–" if entry is None else f"{significant(entry['p50'])} ms ({entry['p50'] / first['p50']:.2f}×)"
            for entry in figures
        ]
        table.add_row(words, *cells)
    return table


def _cells(figures: Mapping[str, float]) -> list[str]:
    return [significant(figures[key]) for key in ("mean", "p50", "p95")]


def _mean(figures: Mapping[str, float] | None) -> str:
    return significant(figures["mean"]) if figures else "–"
