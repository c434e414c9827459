"""What commands read: their common options, and paths that may be URLs, of a configuration and of results."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerlens.exceptions import ConfigurationError
from layerlens.vocabulary import RESOURCES

if TYPE_CHECKING:
    from layerlens.config import RunConfig
    from layerlens.config.loader import Setting


def read_config(config: Path | None, settings: Sequence[str | Setting] = ()) -> RunConfig:
    """The configuration in a file, at a URL (relative paths start from the URL's folder there), or of settings alone.

    Raises:
        ConfigurationError: see ``load_run_config``.
        StorageError: there is nothing at the URL.
    """
    from layerlens.config import load_run_config, parse_run_config
    from layerlens.config.yaml_source import MAX_BYTES
    from layerlens.storage import local_or_url, read_text

    if config is None:
        return parse_run_config("", "options", settings)
    path, url = local_or_url(config)
    if url is None:
        return load_run_config(path, settings)
    return _rebased(parse_run_config(read_text(url, MAX_BYTES), url, settings), url.rpartition("/")[0])


def base_dir_of(config: Path | None) -> Path:
    """The folder that relative paths of a configuration start from; those of one at a URL are URLs by now."""
    from layerlens.storage import local_or_url

    if config is None:
        return Path.cwd()
    path, url = local_or_url(config)
    return Path.cwd() if url is not None else path.absolute().parent


def absolute(place: Path) -> str:
    """A place that was typed here: an absolute path, or the URL."""
    from layerlens.storage import local_or_url

    path, url = local_or_url(place)
    return str(path.absolute()) if url is None else url


def budget_of(resource: str, text: str, option: str) -> float:
    """The budget that was typed, as a plain number.

    Raises:
        ConfigurationError: there is no such resource, or the text is no amount of it.
    """
    if resource not in RESOURCES:
        raise ConfigurationError(f"--resource: got {resource!r}; choose from {', '.join(RESOURCES)}")
    try:
        return float(RESOURCES[resource].quantity.parse(text))
    except ValueError as error:
        raise ConfigurationError(f"{option}: {error}, got {text!r}") from error


@contextmanager
def output_directory(place: Path) -> Iterator[Path]:
    """A local directory to write to, published to ``place`` when the block ends well, if that is a URL.

    Raises:
        OutputError: ``place`` cannot be written.
    """
    from layerlens.storage import check_publishable, local_or_url, publish
    from layerlens.utils.atomic import check_writable

    path, url = local_or_url(place)
    if url is None:
        check_writable(path)
        yield path
        return
    check_publishable(url)
    with tempfile.TemporaryDirectory(prefix="layerlens-") as work:
        local = Path(work) / "out"
        yield local
        publish(local, url, owned=sorted(entry.name for entry in local.iterdir()))


def published_files(files: dict[str, Path], local: Path, place: Path) -> dict[str, Path]:
    """Files that were written below ``local``, where ``output_directory`` has put them."""
    from layerlens.storage import joined, local_or_url

    path, url = local_or_url(place)
    if url is None:
        return {name: path / file.relative_to(local) for name, file in files.items()}
    return {name: Path(joined(url, file.relative_to(local).as_posix())) for name, file in files.items()}


def _rebased(config: RunConfig, folder: str) -> RunConfig:
    """The configuration with its relative paths below the URL ``folder``; model names may be hub names and stay."""
    from layerlens.storage import joined, url_of

    def below(value: str | None) -> str | None:
        if value is None or url_of(value) or value.startswith(("/", "~")) or ":" in value.split("/")[0]:
            return value
        return joined(folder, value)

    changed: dict[str, Any] = {
        "data": config.data.model_copy(update={"source": below(config.data.source)}),
        "output": config.output.model_copy(update={"directory": below(config.output.directory)}),
        "runtime": config.runtime.model_copy(update={"cache_dir": below(config.runtime.cache_dir)}),
    }
    return config.model_copy(update=changed)


Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration file (YAML).", show_default=False)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Explain = Annotated[
    bool,
    typer.Option("--explain", help="Show the runner-up of every layer, and what would make it win."),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show one sample of the data as the model sees it.")]
Json = Annotated[bool, typer.Option("--json", help="Write the result as JSON to stdout, without tables.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow the base model's own Python code to run.")
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Directory for the results, instead of the configuration's.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Replace a setting, such as optimization.max_trainable_params=20000; repeatable."),
]
