"""Commands about the sensitivity cache: ``cache ls``, ``cache rm``, ``cache verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerlens.cli import output
from layerlens.cli.errors import guarded
from layerlens.cli.places import Debug, Json
from layerlens.exceptions import ActivationCacheError, ConfigurationError

if TYPE_CHECKING:
    from layerlens.profiling.cache import SensitivityCache

app = typer.Typer(help="List, remove and verify cached statistics.", no_args_is_help=True)

Directory = Annotated[
    Path | None,
    typer.Option("--cache-dir", help="Cache directory; $LAYERLENS_CACHE or the user's cache directory when not given."),
]
KEY_LENGTH = 12


@app.command("ls")
@guarded()
def ls(cache_dir: Directory = None, json: Json = False, debug: Debug = False) -> None:
    """List the entries: model, samples, size, age, and whether each is intact."""
    import dataclasses

    cache = _open(cache_dir)
    entries = cache.entries()
    if json:
        output.json_result([dataclasses.asdict(entry) for entry in entries])
        return
    from layerlens.cli.output import scaled
    from layerlens.cli.tables import new_table

    table = new_table(f"Sensitivity cache in {output.short(cache.directory)}")
    for name in ("key", "model", "samples", "size", "made (UTC)", "state"):
        table.add_column(name, justify="right" if name in ("samples", "size") else "left")
    for entry in entries:
        suffix = next((x for x in (".partial", ".proxies", ".stream", ".run") if entry.key.endswith(x)), "")
        table.add_row(
            entry.key[:KEY_LENGTH] + suffix, entry.model_name, str(entry.n_samples), f"{scaled(entry.bytes)}B",
            entry.created_at, entry.state,
        )  # fmt: skip
    output.console().print(table)


@app.command("rm")
@guarded()
def rm(
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY]...", help="Keys, or their first characters.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove everything.")] = False,
    damaged: Annotated[
        bool, typer.Option("--damaged", help="Remove entries that are damaged, missing or from other programs.")
    ] = False,
    cache_dir: Directory = None,
    debug: Debug = False,
) -> None:
    """Remove statistics. The next run that needs them measures them again."""
    cache = _open(cache_dir)
    entries = cache.entries()
    chosen = {entry.key for entry in entries if everything or (damaged and entry.state != "ok")}
    for given in keys or ():
        found = {entry.key for entry in entries if entry.key.startswith(given)}
        if not found:
            raise ConfigurationError(f"no entry begins with {given!r}; `layerlens cache ls` lists them")
        chosen |= found
    if not (keys or everything or damaged):
        raise ConfigurationError("nothing to remove: give keys, --damaged or --all")
    cache.remove(sorted(chosen))
    output.note(f"Removed {len(chosen)} of {len(entries)} entries.")


@app.command("verify")
@guarded()
def verify(cache_dir: Directory = None, debug: Debug = False) -> None:
    """Verify the checksum of every entry. Fails if one does not match."""
    entries = _open(cache_dir).entries()
    bad = [entry for entry in entries if entry.state != "ok"]
    for entry in bad:
        output.warning(f"{entry.key[:KEY_LENGTH]}: {entry.state}")
    if bad:
        raise ActivationCacheError(
            f"{len(bad)} of {len(entries)} entries are damaged; runs measure them again, and `layerlens cache rm "
            "--damaged` removes them"
        )
    output.note(f"{len(entries)} entries, all whole.")


def _open(cache_dir: Path | None) -> SensitivityCache:
    from layerlens.profiling.cache import SensitivityCache
    from layerlens.storage import url_of
    from layerlens.utils.places import default_cache_dir

    if cache_dir is not None and url_of(cache_dir):
        raise ConfigurationError(
            f"--cache-dir: {url_of(cache_dir)} is a cache in a store; manage it with the store's own tools (blobs are "
            "never rewritten, and you may remove one without an index entry)"
        )
    return SensitivityCache(cache_dir or default_cache_dir())
