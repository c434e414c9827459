"""Commands about configuration files: ``init``, ``validate``, ``schema``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from layerlens.cli import output
from layerlens.cli.errors import guarded
from layerlens.cli.flags import (
    KEYS,
    Data,
    MaxFlops,
    MaxLatency,
    MaxParams,
    MaxStep,
    MaxVram,
    Methods,
    Model,
    OptionalConfig,
    TaskOption,
    all_settings,
    given_options,
)
from layerlens.cli.places import Debug, Json, Set, base_dir_of
from layerlens.exceptions import ConfigurationError

DEFAULT_PATH = Path("config.yaml")


@guarded()
def init(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="File to write.")] = DEFAULT_PATH,
    model: Model = None,
    data: Data = None,
    task: TaskOption = None,
    max_params: MaxParams = None,
    max_vram: MaxVram = None,
    max_flops: MaxFlops = None,
    max_latency: MaxLatency = None,
    max_step: MaxStep = None,
    methods: Methods = None,
    full: Annotated[bool, typer.Option("--full", help="Write every key, with its description and default.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    debug: Debug = False,
) -> None:
    """Write a short configuration for your model and data to start from."""
    from layerlens.config.example import example_config, settled, short_config
    from layerlens.utils.atomic import atomic_write_text

    if path.is_dir():
        path = path / DEFAULT_PATH
    if path.exists() and not force:
        raise ConfigurationError(f"{path} already exists; give another name, or --force to replace it")
    options = given_options(model, data, task, methods, max_params, max_vram, max_flops, max_latency, max_step)
    values = settled({KEYS[option]: value for option, value in options.items()})
    comments: dict[str, str] = {}
    if model is not None and data is not None:
        from layerlens.tasks.look import fitted

        values, comments = fitted(values, Path.cwd())
    for key in ("model.name_or_path", "data.source"):
        values[key] = _from(path.parent, str(values[key]))
    atomic_write_text(path, example_config(values) if full else short_config(values, comments))
    for key, why in comments.items():
        output.note(f"{key}: {values[key]}, {why}" if key != "data.source" else f"Data: {why}")
    output.note(f"Wrote {path}. Set the model, the data and your budgets in it, then: {output.command('run', path)}")


def _from(folder: Path, place: str) -> str:
    """A place that was typed here, as a file in ``folder`` has it; what is not there is a name and stays."""
    if not Path(place).exists() or Path(place).is_absolute() or folder.absolute() == Path.cwd():
        return place
    return os.path.relpath(place, folder)


@guarded()
def validate(
    config: OptionalConfig = None,
    model: Model = None,
    data: Data = None,
    task: TaskOption = None,
    max_params: MaxParams = None,
    max_vram: MaxVram = None,
    max_flops: MaxFlops = None,
    max_latency: MaxLatency = None,
    max_step: MaxStep = None,
    methods: Methods = None,
    settings: Set = None,
    show_sample: Annotated[
        bool,
        typer.Option("--show-sample", help="Read all data, and show one sample as the model sees it."),
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a configuration without running it: its keys, the model's config.json and the first rows of the data."""
    from layerlens.cli.places import read_config
    from layerlens.tasks.look import look
    from layerlens.utils.threads import resolve_threads

    options = given_options(model, data, task, methods, max_params, max_vram, max_flops, max_latency, max_step)
    checked = read_config(config, all_settings(config, options, settings))
    resolve_threads(checked.runtime.threads)  # the only setting that this machine may not have
    checked, guess, found = look(checked, base_dir_of(config))
    summary = None
    if show_sample:
        from layerlens.jobs.load import summary_of

        summary = summary_of(checked, base_dir_of(config))
    if json:
        read = {} if summary is None else {"read": summary.fields()}
        output.json_result(checked.model_dump(mode="json") | read)
        return
    if guess is not None:
        output.note(str(guess))
    if summary is not None:
        from layerlens.cli.tables import data as data_table

        output.console().print(data_table(summary, sample=True))
    elif found:
        output.note(f"Data: {found}")
    if config is None:
        output.note("The options are valid. Run them with: layerlens run, and the same options")
    else:
        from layerlens.storage import shown

        output.note(f"{shown(config)} is valid. Run it with: {output.command('run', shown(config))}")


@guarded()
def schema(
    manifest: Annotated[bool, typer.Option("--manifest", help="Write the schema of manifest.json instead.")] = False,
    debug: Debug = False,
) -> None:
    """Write the JSON Schema of the configuration (for editors) or of the manifest to stdout."""
    if manifest:
        from layerlens.manifest import manifest_schema

        output.json_result(manifest_schema())
    else:
        from layerlens.config import config_schema

        output.json_result(config_schema())
