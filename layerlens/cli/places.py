"""What every command reads: its common options, paths and URLs, and the layers of a configuration's model."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from layerlens.config import RunConfig


def read_config(config: Path, settings: Sequence[str] = ()) -> RunConfig:
    """The configuration in a file or at a URL; there, relative paths start from the URL's folder.

    Raises:
        ConfigurationError: see ``load_run_config``.
        StorageError: there is nothing at the URL.
    """
    from layerlens.config import load_run_config, parse_run_config
    from layerlens.config.yaml_source import MAX_BYTES
    from layerlens.storage import local_or_url, read_text

    path, url = local_or_url(config)
    if url is None:
        return load_run_config(path, settings)
    return _rebased(parse_run_config(read_text(url, MAX_BYTES), url, settings), url.rpartition("/")[0])


def base_dir_of(config: Path) -> Path:
    """The folder that relative paths of a configuration start from; those of one at a URL are URLs by now."""
    from layerlens.storage import local_or_url

    path, url = local_or_url(config)
    return Path.cwd() if url is not None else path.absolute().parent


def absolute(place: Path) -> str:
    """A place that was typed here: an absolute path, or the URL."""
    from layerlens.storage import local_or_url

    path, url = local_or_url(place)
    return str(path.absolute()) if url is None else url


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


_BLOCK = re.compile(r"(?P<stack>.*?)(?:^|\.)(?P<block>\d+)(?:\.(?P<role>.+))?$")
_SAYS_NOTHING = ("dense", "self", "proj", "linear")


class Position(NamedTuple):
    """``bert.encoder.layer.3.attention.self.query``: stack ``bert.encoder.layer``, block 3, role ``query``.

    ``block`` is None for layers outside of the blocks; their role is their name.
    """

    stack: str
    block: int | None
    role: str


def positions(names: Sequence[str]) -> dict[str, Position]:
    """Position of every name; roles are as short as they can be while all of them differ."""
    found = {}
    for name in names:
        match = _BLOCK.match(name)
        if match is None:
            found[name] = Position("", None, name)
        else:
            found[name] = Position(match["stack"], int(match["block"]), match["role"] or "block")
    paths = list(dict.fromkeys(place.role for place in found.values() if place.block is not None))
    short = _short_roles(paths)
    return {
        name: place if place.block is None else place._replace(role=short[place.role]) for name, place in found.items()
    }


def _short_roles(paths: list[str]) -> dict[str, str]:
    """``attention.output.dense`` -> ``attention.output``: the shortest telling endings that are unique."""
    telling = {path: _without_empty_words(path) for path in paths}
    if len(set(telling.values())) < len(paths):
        telling = {path: path for path in paths}
    short = {}
    for path in paths:
        words = telling[path].split(".")
        for start in range(len(words) - 1, -1, -1):
            ending = ".".join(words[start:])
            if sum(_ends_with(other, ending) for other in telling.values()) == 1:
                break
        # The ending of a longer path (attention.output) may be a whole other path (output): both keep all their words.
        short[path] = ending
    return short


def _without_empty_words(path: str) -> str:
    words = path.split(".")
    while len(words) > 1 and words[-1] in _SAYS_NOTHING:
        words.pop()
    return ".".join(words)


def _ends_with(path: str, ending: str) -> bool:
    return path == ending or path.endswith(f".{ending}")


Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration file (YAML).", show_default=False)]
ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="Configuration file (YAML) with the budgets.", show_default=False)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Explain = Annotated[
    bool,
    typer.Option("--explain", help="Show for every layer the runner-up and what would make it win."),
]
Json = Annotated[bool, typer.Option("--json", help="Write the result as JSON to stdout, and no tables.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Directory for the results, instead of the configuration's.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")]
Statistics = Annotated[
    Path, typer.Argument(metavar="STATISTICS", help="statistics.safetensors of an earlier run.", show_default=False)
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Replace a setting, such as optimization.max_trainable_params=20000; repeatable."),
]
