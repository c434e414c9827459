"""``estimate``: costs of a choice, or of uniform LoRA, from a model's configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerlens.cli import output
from layerlens.cli.errors import guarded
from layerlens.cli.places import Debug, Json
from layerlens.exceptions import ConfigurationError

DTYPES, DEVICES = ("float32", "bfloat16", "float16"), ("cpu", "gpu")


@guarded()
def estimate(
    manifest: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MANIFEST|DIRECTORY]", help="A manifest, or the directory with one; or --model and --rank instead."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Model directory, config.json or hub name; its weights are not needed."),
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", "-r", min=1, help="Rank of uniform LoRA.")] = None,
    targets: Annotated[
        str,
        typer.Option(
            help="Layers, by the ends of their names, separated by commas; all: every layer that LoRA can adapt."
        ),
    ] = "all",
    task: Annotated[str | None, typer.Option(help="Task; that of the model's configuration when not given.")] = None,
    classes: Annotated[
        int | None,
        typer.Option(min=1, help="Outputs of a classifier; those of the model's configuration when not given."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}.", show_default="float32")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples in a batch.", show_default="the manifest's, else 8")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a sequence.", show_default="the manifest's, else 128")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help=f"{' or '.join(DEVICES)}.", show_default="the manifest's, else cpu")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Estimate parameters, FLOPs, memory and latency of a choice or of uniform LoRA, without weights or data."""
    _check(manifest, model, rank, targets, task, classes, dtype, device)
    from layerlens.jobs.estimate import estimate as estimated
    from layerlens.jobs.recorded import manifest_at
    from layerlens.manifest import read_manifest

    if manifest is not None:
        path = manifest_at(manifest)
        found = estimated(
            read_manifest(path),
            model=model,
            name=output.short(path),
            batch_size=batch_size,
            sequence_length=sequence_length,
            device=device,
        )
    else:
        found = estimated(
            model or "",
            rank=rank,
            targets=[name.strip() for name in targets.split(",") if name.strip()],
            task=task,
            classes=classes,
            dtype=dtype or "float32",
            batch_size=batch_size,
            sequence_length=sequence_length,
            device=device,
        )
    if json:
        output.json_result(found.to_dict())
    else:
        output.note(str(found))


def _check(
    manifest: Path | None, model: str | None, rank: int | None, targets: str, task: str | None, classes: int | None,
    dtype: str | None, device: str | None,
) -> None:  # fmt: skip
    """Refuse options that do not go together before anything is loaded."""
    from layerlens.registry import TASKS

    if manifest is None and (model is None or rank is None):
        raise ConfigurationError("give a manifest, or --model and --rank for uniform LoRA")
    lora = {"--rank": rank, "--targets": None if targets == "all" else targets, "--task": task, "--classes": classes,
            "--dtype": dtype}  # fmt: skip
    given = [option for option, value in lora.items() if value is not None]
    if manifest is not None and given:
        raise ConfigurationError(f"{given[0]} is for uniform LoRA (--model without a manifest); a manifest has its own")
    for option, value, known in (
        ("--task", task, tuple(TASKS)),
        ("--dtype", dtype, DTYPES),
        ("--device", device, DEVICES),
    ):
        if value is not None and value not in known:
            raise ConfigurationError(f"{option}: got {value!r}; choose from {', '.join(known)}")
