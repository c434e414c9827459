"""``pipeline``: images through a detector and a language model to reports, with the time of every step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from layerlens.cli import output
from layerlens.cli.errors import UNEXPECTED, guarded
from layerlens.cli.places import Debug, Json, Quiet
from layerlens.exceptions import ConfigurationError


@guarded("finished images are in results/ and annotated/ of the output directory")
def pipeline(
    images: Annotated[
        list[str],
        typer.Option("--images", "-i", help="Image file, folder or pattern; repeatable.", show_default=False),
    ],
    detector: Annotated[
        str | None,
        typer.Option("--detector", "-d", help="ultralytics weights (.pt), or the name of published weights."),
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
    llm_model: Annotated[str | None, typer.Option(help="Name of the model on the server.")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable with the server's key.")] = None,
    detector_adapter: Annotated[
        str | None, typer.Option(help="Folder of a tuned detector, to time beside the base, unmerged and merged.")
    ] = None,
    llm_adapter: Annotated[
        str | None, typer.Option(help="Folder of a tuned adapter for a local language model.")
    ] = None,
    prompt: Annotated[
        Path | None, typer.Option(help="File with a template of the request; {findings} stands for the boxes.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per detector call.")] = 1,
    repeats: Annotated[int, typer.Option(help="Measured passes over all images.")] = 1,
    warmup: Annotated[int, typer.Option(help="Warm-up passes over the first batch, reported separately.")] = 1,
    confidence: Annotated[float, typer.Option(help="Leave out boxes below this confidence.")] = 0.25,
    iou: Annotated[float, typer.Option(help="Keep only the best of boxes that overlap more than this.")] = 0.5,
    image_size: Annotated[int | None, typer.Option(help="Side of the detector's input, in pixels.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest report, in tokens.")] = 160,
    max_megapixels: Annotated[float, typer.Option(help="Refuse larger images.")] = 100.0,
    timeout_s: Annotated[float, typer.Option(help="Maximum time for one answer of the server.")] = 120.0,
    retries: Annotated[int, typer.Option(help="Number of retries for requests that may still succeed.")] = 3,
    device: Annotated[str, typer.Option(help="cpu, cuda:0 ...")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: one per core.")] = 0,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run a detector on every image, write reports with a language model, and time every step."""
    from layerlens.config.vision_language import PipelineConfig

    models: dict[str, Any] = {"detector": detector, "llm": llm}  # the configuration says which are missing
    template = _template(prompt)
    try:
        config = PipelineConfig(
            **models, images=tuple(images), llm_model=llm_model, api_key_env=api_key_env,
            detector_adapter=detector_adapter, llm_adapter=llm_adapter, prompt=template, batch_size=batch_size,
            repeats=repeats, warmup=warmup, confidence=confidence, iou=iou, image_size=image_size,
            max_new_tokens=max_new_tokens, max_megapixels=max_megapixels, timeout_s=timeout_s, retries=retries,
            device=device, threads=threads,
        )  # fmt: skip
    except ConfigurationError as error:
        raise ConfigurationError(_by_option(str(error))) from error
    from layerlens.cli.commands_run import do
    from layerlens.jobs.vision_language import run_vision_language

    result: Any = do(lambda progress, warn: run_vision_language(config, directory, progress=progress, warn=warn), quiet)
    if json:
        output.json_result({"directory": directory, "files": result.files, **result.summary})
    elif not quiet:
        from layerlens.cli.pipeline_tables import show

        show(result, output.console())
    if result.failed:
        output.error(f"{len(result.failed)} of {len(result.items)} images failed; the reasons are in summary.json")
        raise typer.Exit(UNEXPECTED)


def _template(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--prompt: cannot read {path}: {error}") from error


def _by_option(message: str) -> str:
    """An error of the configuration with options in place of its fields.

    >>> _by_option("PipelineConfig.batch_size: must be greater than or equal to 1, got 0")
    '--batch-size: must be greater than or equal to 1, got 0'
    >>> _by_option("PipelineConfig: detector is missing: a file")
    '--detector is missing: a file'
    """
    message = re.sub(r"\b(detector|llm) is missing", r"--\1 is missing", message.replace("PipelineConfig: ", ""))
    return re.sub(r"PipelineConfig\.(\w+)", lambda found: "--" + found[1].replace("_", "-"), message)
