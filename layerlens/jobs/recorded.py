"""The configuration that a manifest records, for commands that go on from a manifest without a file of settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from layerlens.config import RunConfig, parse_run_config
from layerlens.exceptions import ConfigurationError
from layerlens.models import Manifest


def recorded_settings(manifest: Manifest) -> dict[str, Any]:
    """The configuration that the manifest's run had, as it was written.

    Raises:
        ConfigurationError: the manifest does not have it.
    """
    recorded = manifest.provenance.config
    if recorded is None:
        raise ConfigurationError("the manifest does not record its run's configuration; give one with -c CONFIG")
    return dict(recorded)


def config_of(manifest: Manifest, overrides: Sequence[str] = (), origin: str = "provenance.config") -> RunConfig:
    """The configuration of the run that wrote ``manifest``.

    Args:
        manifest: what a run wrote.
        overrides: ``section.key=value`` settings that replace recorded ones; the value is YAML.
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
