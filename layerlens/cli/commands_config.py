"""Commands about configuration files: ``init``, ``validate``, ``schema``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerlens.cli import output
from layerlens.cli.errors import guarded
from layerlens.cli.places import Config, Debug, Json, Set, base_dir_of
from layerlens.exceptions import ConfigurationError

DEFAULT_PATH = Path("config.yaml")


@guarded()
def init(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="File to write.")] = DEFAULT_PATH,
    model: Annotated[
        str | None, typer.Option(help="Model directory, hub name or package:NAME to start with.", show_default=False)
    ] = None,
    data: Annotated[str | None, typer.Option(help="Data source to start with.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    debug: Debug = False,
) -> None:
    """Write a commented configuration to start from."""
    from layerlens.config.schema import EXAMPLE_MODEL, EXAMPLE_SOURCE, example_config
    from layerlens.utils.atomic import atomic_write_text

    if path.is_dir():
        path = path / DEFAULT_PATH
    if path.exists() and not force:
        raise ConfigurationError(f"{path} is already there; give another name, or --force to replace it")
    atomic_write_text(path, example_config(model or EXAMPLE_MODEL, data or EXAMPLE_SOURCE))
    output.note(f"Wrote {path}. Set the model, the data and your budgets in it, then: {output.command('run', path)}")


@guarded()
def validate(
    config: Config,
    settings: Set = None,
    show_sample: Annotated[
        bool,
        typer.Option(
            "--show-sample", help="Read the data too, and show what was read and one sample as the model would see it."
        ),
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a configuration without running it."""
    from layerlens.cli.places import read_config
    from layerlens.config.compatibility import refuse_conflicts
    from layerlens.utils.threads import resolve_threads

    checked = read_config(config, settings or ())
    refuse_conflicts(checked, "run")
    resolve_threads(checked.runtime.threads)  # the only setting that this machine may not have
    if show_sample:
        from layerlens.cli.tables import data
        from layerlens.jobs.load import look

        summary = look(checked, base_dir_of(config))
        if json:
            output.json_result({**checked.model_dump(mode="json"), "read": summary.fields()})
            return
        output.console().print(data(summary, sample=True))
    if json:
        output.json_result(checked.model_dump(mode="json"))
    else:
        from layerlens.storage import shown

        output.note(f"{shown(config)} is valid. Run it with: {output.command('run', shown(config))}")


@guarded()
def schema(
    manifest: Annotated[bool, typer.Option("--manifest", help="The schema of manifest.json instead.")] = False,
    debug: Debug = False,
) -> None:
    """Write the JSON Schema of the configuration to stdout (for editors), or that of the manifest."""
    if manifest:
        from layerlens.manifest import manifest_schema

        output.json_result(manifest_schema())
    else:
        from layerlens.config import config_schema

        output.json_result(config_schema())
