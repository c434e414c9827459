"""What an earlier run left behind: its manifest, the statistics beside it, and the configuration that it records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from layerlens.config import RunConfig, parse_run_config
from layerlens.config.loader import Setting
from layerlens.config.training import REPORTS
from layerlens.exceptions import ConfigurationError
from layerlens.models import Manifest
from layerlens.storage import joined, local_or_url

MANIFEST, STATISTICS = "manifest.json", "statistics.safetensors"
MANIFEST_ENDINGS = (".json", ".yaml", ".yml")
ASKED_ANEW = ("telemetry", "tracking")
"""Sections that say where something is sent. No run records them, and a manifest of somebody else's may not say it."""


def manifest_at(place: Path) -> Path:
    """The manifest that ``place`` names: itself, that of an output directory, or that beside a run's statistics.

    Raises:
        ConfigurationError: the directory has none.
    """
    path, url = local_or_url(place)
    if url is not None:
        return place if path.suffix in MANIFEST_ENDINGS else Path(joined(_folder(url), MANIFEST))
    if not path.is_dir() and path.suffix != ".safetensors":
        return path
    folder = path if path.is_dir() else path.parent
    found = [folder / f"manifest{ending}" for ending in MANIFEST_ENDINGS if (folder / f"manifest{ending}").is_file()]
    if not found:
        raise ConfigurationError(f"{folder} has no manifest.json; give a manifest, or the directory that a run wrote")
    return found[0]


def statistics_at(place: Path) -> Path:
    """The statistics that ``place`` names: itself, or those in an output directory or beside a manifest.

    Raises:
        ConfigurationError: there are none.
    """
    path, url = local_or_url(place)
    if url is not None:
        return place if path.suffix == ".safetensors" else Path(joined(_folder(url), STATISTICS))
    if not path.is_dir() and path.suffix not in MANIFEST_ENDINGS:
        return path
    folder = path if path.is_dir() else path.parent
    # `layerlens optimize` writes its manifest to a folder below the statistics.
    for found in (folder / STATISTICS, *([] if path.is_dir() else [folder.parent / STATISTICS])):
        if found.is_file():
            return found
    raise ConfigurationError(
        f"{folder / STATISTICS}: no such file; `layerlens run` writes it beside its manifest. Name the file that the "
        "choice was made by"
    )


def recorded_settings(manifest: Manifest) -> dict[str, Any]:
    """The configuration that the manifest's run had, as it was written.

    Raises:
        ConfigurationError: the manifest does not have it.
    """
    recorded = manifest.provenance.config
    if recorded is None:
        raise ConfigurationError("the manifest does not record its run's configuration; give one with -c CONFIG")
    kept = {name: section for name, section in recorded.items() if name not in ASKED_ANEW}
    if isinstance(training := kept.get("training"), Mapping):
        kept["training"] = {name: value for name, value in training.items() if name not in REPORTS}
    return kept


def config_of(
    manifest: Manifest, overrides: Sequence[str | Setting] = (), origin: str = "provenance.config"
) -> RunConfig:
    """The configuration of the run that wrote ``manifest``.

    Args:
        manifest: what a run wrote.
        overrides: ``section.key=value`` (the value is YAML) or ``Setting``: what replaces recorded settings.
        origin: what messages about a setting call the manifest.

    Raises:
        ConfigurationError: there is none, it is of another version, or an override is wrong.
    """
    settings = recorded_settings(manifest)
    if overrides:
        return parse_run_config(yaml.safe_dump(settings), origin, overrides)
    try:
        return RunConfig(**settings)
    except ConfigurationError as error:
        raise ConfigurationError(f"the manifest's recorded configuration cannot be used ({error}); give -c") from error


def _folder(url: str) -> str:
    """The folder of a result at a URL: the URL itself, or that of the file that it names."""
    named = url.endswith((*MANIFEST_ENDINGS, ".safetensors"))
    return url.rpartition("/")[0] if named else url.rstrip("/")
