"""``pipeline``: images through a detector and a language model to reports, with the time of every step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from layerlens.cli import output
from layerlens.cli.errors import UNEXPECTED, guarded
from layerlens.cli.output import short
from layerlens.cli.parameters import Debug, Json, Quiet
from layerlens.cli.tables import new_table, significant
from layerlens.vision_language.results import STEPS

if TYPE_CHECKING:
    from layerlens.jobs.vision_language import VisionLanguageResult


@guarded("images that were done are in results/ and annotated/ of the output directory")
def pipeline(
    images: Annotated[
        list[str],
        typer.Option("--images", "-i", help="Image file, folder or pattern; repeatable.", show_default=False),
    ],
    detector: Annotated[
        str | None,
        typer.Option("--detector", "-d", help="ultralytics weights (.pt), or the name of published ones."),
    ] = None,
    llm: Annotated[
        str | None,
        typer.Option(
            "--llm",
            "-l",
            help="URL of an OpenAI-compatible server, or a model for transformers: directory, hub name, package:NAME.",
        ),
    ] = None,
    directory: Annotated[Path, typer.Option("--output", "-o", help="Directory for the results.")] = Path(
        "pipeline-out"
    ),
    llm_model: Annotated[str | None, typer.Option(help="The server's name of the model.")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable with the server's key.")] = None,
    detector_adapter: Annotated[
        str | None, typer.Option(help="Folder of a tuned detector: time it beside the base, unmerged and merged.")
    ] = None,
    llm_adapter: Annotated[str | None, typer.Option(help="The same for a local language model.")] = None,
    prompt: Annotated[
        Path | None, typer.Option(help="File with a template of the request; {findings} is where the boxes go.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images that the detector sees at once.")] = 1,
    repeats: Annotated[int, typer.Option(help="Measured passes over all images.")] = 1,
    warmup: Annotated[int, typer.Option(help="Passes over the first batch before, kept apart.")] = 1,
    confidence: Annotated[float, typer.Option(help="Boxes below are left out.")] = 0.25,
    iou: Annotated[float, typer.Option(help="Of boxes that overlap more, the best stays.")] = 0.5,
    image_size: Annotated[int | None, typer.Option(help="Side of the detector's input, in pixels.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest report, in tokens.")] = 160,
    max_megapixels: Annotated[float, typer.Option(help="Larger images are refused.")] = 100.0,
    timeout_s: Annotated[float, typer.Option(help="Longest time for one answer of a server.")] = 120.0,
    retries: Annotated[int, typer.Option(help="How often a request is repeated that may yet succeed.")] = 3,
    device: Annotated[str, typer.Option(help="cpu, cuda:0 ...")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 for one on each core.")] = 0,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Detect on every image, have a language model write a report, and time every step."""
    from layerlens.config.vision_language import PipelineConfig

    models: dict[str, Any] = {"detector": detector, "llm": llm}  # the configuration says which are missing
    config = PipelineConfig(
        **models, images=tuple(images), llm_model=llm_model, api_key_env=api_key_env,
        detector_adapter=detector_adapter, llm_adapter=llm_adapter, prompt=_template(prompt), batch_size=batch_size,
        repeats=repeats, warmup=warmup, confidence=confidence, iou=iou, image_size=image_size,
        max_new_tokens=max_new_tokens, max_megapixels=max_megapixels, timeout_s=timeout_s, retries=retries,
        device=device, threads=threads,
    )  # fmt: skip
    from layerlens.cli.commands_run import do
    from layerlens.jobs.vision_language import run_vision_language

    result: Any = do(lambda progress, warn: run_vision_language(config, directory, progress=progress, warn=warn), quiet)
    if json:
        output.json_result({"directory": directory, "files": result.files, **result.summary})
    elif not quiet:
        from layerlens.cli.commands_pipeline import show

        show(result, output.console())
    if result.failed:
        output.error(f"{len(result.failed)} of {len(result.items)} images failed; the reasons are in summary.json")
        raise typer.Exit(UNEXPECTED)


def _template(path: Path | None) -> str | None:
    from layerlens.exceptions import ConfigurationError

    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"prompt: cannot read {path}: {error}") from error


SHOWN_REPORTS = 4


def show(result: VisionLanguageResult, console: Console) -> None:
    """Write the summary for people."""
    summary = result.summary
    for item in result.items[:SHOWN_REPORTS]:
        outcome = item.latest(summary["primary"])
        if outcome is not None:
            words = outcome.report or f"failed: {outcome.reason}"
            console.print(Text.assemble((f"{item.path.name}: ", "bold"), words), soft_wrap=True)
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
