"""What a command that goes on from saved statistics works on: the statistics, a configuration, and where results go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerlens.cli import output
from layerlens.cli.flags import all_settings
from layerlens.cli.places import absolute, base_dir_of, read_config
from layerlens.exceptions import ConfigurationError

if TYPE_CHECKING:
    from layerlens.config import RunConfig

SavedStatistics = Annotated[
    Path,
    typer.Argument(
        metavar="STATISTICS|DIRECTORY",
        help="statistics.safetensors of an earlier run, or the directory with it.",
        show_default=False,
    ),
]
SavedConfig = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="Configuration file (YAML); that of the manifest beside the statistics when not given.",
        show_default=False,
    ),
]


def saved_job(
    place: Path,
    config: Path | None,
    options: dict[str, str | list[str]],
    settings: Sequence[str] | None,
    directory: Path | None,
    folder: str = "",
) -> tuple[Path, RunConfig, Path]:
    """(the statistics, the configuration with all that was typed, the folder that its relative paths start from).

    Args:
        place: statistics, or the directory with them.
        config: file with the configuration; the manifest's beside the statistics when None.
        options: that were given, by name.
        settings: of ``--set``.
        directory: for the results.
        folder: beside the statistics, for the results where neither a directory nor a file says where; "" for among
            them.

    Raises:
        ConfigurationError: there are no statistics, no configuration, or it is wrong.
    """
    from layerlens.config import OutputConfig
    from layerlens.jobs.recorded import statistics_at
    from layerlens.storage import joined, local_or_url

    statistics = statistics_at(place)
    if config is not None:
        checked, base_dir = read_config(config, all_settings(config, options, settings)), base_dir_of(config)
    else:
        checked, base_dir = _recorded(statistics, options, settings), Path.cwd()
        path, url = local_or_url(statistics)
        if directory is None:
            directory = path.parent / folder if url is None else Path(joined(url.rpartition("/")[0], folder))
    if directory is not None:
        checked = checked.model_copy(update={"output": OutputConfig(directory=absolute(directory))})
    return statistics, checked, base_dir


def _recorded(statistics: Path, options: dict[str, str | list[str]], settings: Sequence[str] | None) -> RunConfig:
    from layerlens.jobs.recorded import config_of, manifest_at
    from layerlens.manifest import read_manifest

    try:
        path = manifest_at(statistics)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{output.short(statistics)} has no manifest beside it that records its configuration; give one with "
            "-c CONFIG"
        ) from error
    origin = f"{output.short(path)} (provenance.config)"
    return config_of(read_manifest(path), all_settings(path, options, settings), origin)
