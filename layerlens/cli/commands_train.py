"""``train``: fine-tune what a manifest chose, and say what it brought and what it took."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerlens.cli import output
from layerlens.cli.commands_run import do, load
from layerlens.cli.errors import guarded
from layerlens.cli.places import Debug, Json, Quiet, Set, base_dir_of
from layerlens.exceptions import ConfigurationError

if TYPE_CHECKING:
    from layerlens.config import RunConfig
    from layerlens.jobs.train import TrainedModel

DEFAULT_FOLDER = "tuned"
BARS, CURVE_WIDTH = "▁▂▃▄▅▆▇█", 24


@guarded("run the same command again to continue from the last checkpoint")
def train(
    manifest: Annotated[
        Path, typer.Argument(metavar="MANIFEST", help="manifest.json or manifest.yaml of a run.", show_default=False)
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            help="Configuration (YAML) with data and training; the configuration of the manifest's run when not given.",
        ),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option("--output", "-o", help=f"Directory for the result; {DEFAULT_FOLDER}/ beside the manifest."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Base model, if it is not where the manifest says.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            help="Train this instead, with the same number of parameters: uniform-lora, adalora, eva (a wrong name "
            "lists all).",
            show_default=False,
        ),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Directory of an earlier training of the same manifest to continue from (SFT, then DPO). Training "
            "starts from its weights.",
            show_default=False,
        ),
    ] = None,
    settings: Set = None,
    restart: Annotated[bool, typer.Option("--restart", help="Start over, and remove existing checkpoints.")] = False,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep the checkpoints after training.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a manifest's choice. Under torchrun or accelerate launch, train on several processes.

    If training is interrupted or killed, the same command continues from the last checkpoint to the same result.
    """
    checked, base_dir = _configuration(manifest, config, settings)
    from layerlens.jobs.train import train_manifest
    from layerlens.utils.launch import is_main_process

    if baseline is not None and start is not None:
        raise ConfigurationError(
            "--from continues with the manifest's own choice, and --baseline trains another; give one"
        )
    if baseline is not None:
        from layerlens.tuning.baselines import known_baseline

        known_baseline(baseline)  # refuses a misspelt name before anything is loaded
    target = directory or manifest.parent / (f"{DEFAULT_FOLDER}-{baseline}" if baseline else DEFAULT_FOLDER)
    follower = not is_main_process()  # one process of several speaks
    result = do(
        lambda progress, warn: train_manifest(
            manifest,
            checked,
            base_dir=base_dir,
            output=target,
            model=model,
            baseline=baseline,
            restart=restart,
            keep_checkpoints=keep_checkpoints,
            start=start,
            progress=progress,
            warn=warn,
        ),
        quiet or follower,
    )
    if follower:
        return
    if json:
        output.json_result(_as_json(result))
    elif not quiet:
        _show(result)


def _configuration(manifest: Path, config: Path | None, settings: list[str] | None) -> tuple[RunConfig, Path]:
    """The configuration, and the folder that its relative paths start from."""
    if config is not None:
        return load(config, settings, None), base_dir_of(config)
    from layerlens.jobs.train import train_config
    from layerlens.manifest import read_manifest

    origin = f"{output.short(manifest)} (provenance.config)"
    return train_config(read_manifest(manifest), settings or (), origin), Path.cwd()


def _as_json(result: TrainedModel) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(result), "data": None if result.data is None else result.data.fields()}


def _show(result: TrainedModel) -> None:
    from rich.text import Text

    from layerlens.cli.next_steps import after_training, show_next
    from layerlens.cli.output import amount, scaled, significant
    from layerlens.cli.tables import data, new_table

    console, training = output.console(), result.training
    if result.data is not None:
        console.print(data(result.data))
    if result.after:
        table = new_table("On the test split")
        table.add_column("")
        for name in ("before", "after"):
            table.add_column(name, justify="right", no_wrap=True)
        for name, value in result.after.items():
            table.add_row(name.replace("_", " "), significant(result.before.get(name, 0.0)), significant(value))
        console.print(table)
    figures = new_table("What it took")
    figures.add_column("")
    figures.add_column("", justify="right", no_wrap=True)
    kept = f" (kept: step {training.best_step})" if training.best_step != training.steps else ""
    figures.add_row("optimiser steps", f"{training.steps}{kept}")
    figures.add_row("trained parameters", f"{training.trained_parameters:,}")
    if result.baseline:
        told = result.baseline
        figures.add_row(f"kept by {told['name']}", f"{told['kept_params']:,} of {told['budget_params']:,}")
    if stored := training.stored_prefix:
        skipped = f"{stored['blocks_skipped']} of {stored['blocks']} blocks, {1e-9 * stored['bytes']:.3g} GB"
        figures.add_row("skipped after the first epoch", skipped)
    figures.add_row("wall time", f"{training.wall_seconds:.1f} s")
    figures.add_row("tokens per second", scaled(training.tokens_per_second))
    figures.add_row(f"memory: {training.peak_memory_of}", amount("vram_gb", training.peak_memory_gb))
    for when, what in (("before", "base model"), ("after", "with its options")):
        figures.add_row(f"inference, one batch: {what}", amount("latency_ms", result.inference_ms[when]))
    console.print(figures)
    if training.losses:
        output.note(f"Training loss: {_curve(training.losses)}")
    if result.baseline.get("note"):
        output.note(f"{result.baseline['name']}: {result.baseline['note']}.")
    if training.stopped_early:
        output.note("Stopped early: the last evaluations brought no improvement.")
    if training.resumed_from is not None:
        output.note(f"Went on from the checkpoint of step {training.resumed_from}.")
    console.print()
    for path in result.files.values():
        console.print(Text(f"  {output.short(path)}"), soft_wrap=True)
    console.print()
    code = f"layerlens.tuning.load(base_model, {output.short(result.directory)!r})"
    console.print(Text.assemble("Use it: ", (code, "bold")), soft_wrap=True)
    show_next(console, after_training(result))


def _curve(losses: Sequence[float]) -> str:
    """The training loss as a row of bars, each the mean of as many steps.

    >>> _curve([4.0, 3.0, 2.0, 1.0])
    '4 → 1  █▆▃▁'
    """
    import numpy as np

    means = [float(part.mean()) for part in np.array_split(np.asarray(losses), min(len(losses), CURVE_WIDTH))]
    low, high = min(means), max(means)
    heights = [round((len(BARS) - 1) * (mean - low) / (high - low)) if high > low else 0 for mean in means]
    ends = f"{output.significant(means[0])} → {output.significant(means[-1])}"
    return f"{ends}  {''.join(BARS[each] for each in heights)}"
