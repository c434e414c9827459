"""What a job may touch: models and data below the operator's roots, URLs below his prefixes, statistics sent before.

A configuration comes from whoever has a token. It is rewritten to absolute places that were found to be allowed, so
that what is checked is what is used.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from layerlens.config import (
    DistributedConfig,
    ModelConfig,
    OutputConfig,
    RunConfig,
    RuntimeConfig,
    TelemetryConfig,
    TrackingConfig,
)
from layerlens.exceptions import ActivationCacheError, ConfigurationError
from layerlens.models import ModelSpec
from layerlens.service.contents import Below, refuse_data, refuse_model_folder
from layerlens.service.settings import ServiceSettings
from layerlens.service.store import JOBS, RESULTS, SUCCEEDED, UPLOADS, JobStore
from layerlens.sources import LoadRequest
from layerlens.sources.timm import RANDOM
from layerlens.storage import local_or_url
from layerlens.utils.user_code import REFERENCE

DEFAULT_OUTPUT = OutputConfig().directory
HUB_PREFIX = "hf:"
STATISTICS_FILE = "statistics.safetensors"
_UPLOAD = re.compile(r"upload:([0-9a-f]{64})")
_JOB = re.compile(r"job:([0-9a-f]{32})")


def confine(config: RunConfig, settings: ServiceSettings) -> RunConfig:
    """The configuration of a run with places that it may use.

    Raises:
        ConfigurationError: the key, what came, and what this server allows.
    """
    _refuse_own_code(config, settings)
    if config.model.device_map is not None:
        raise ConfigurationError("model.device_map: the operator of the server places models; leave it out")
    weights = config.model.weights
    if weights is not None and weights != RANDOM:
        weights = confined_path("model.weights", weights, settings)
        if not weights.endswith(".safetensors"):
            raise ConfigurationError("model.weights: this server loads weights from single .safetensors files only")
    name = "" if config.model.factory is not None else _model(config.model, settings)
    model = config.model.model_copy(update={"name_or_path": name, "weights": weights})
    data = config.data.model_copy(update={"source": _data(config.data.source, settings)})
    confined = confine_settings(config, settings).model_copy(update={"model": model, "data": data})
    check_contents(confined, settings)
    return confined


def confine_settings(config: RunConfig, settings: ServiceSettings) -> RunConfig:
    """The same for a job that loads neither model nor data: where it writes, and what the operator decides."""
    if config.runtime.cache_dir is not None:
        raise ConfigurationError("runtime.cache_dir: the server has its own cache; leave it out")
    if config.telemetry != TelemetryConfig() or config.tracking != TrackingConfig():
        raise ConfigurationError("telemetry, tracking: the operator of the server sets these; leave them out")
    if config.distributed != DistributedConfig():
        raise ConfigurationError("distributed: a job of the server is one process; leave it out")
    changed: dict[str, Any] = {
        "output": OutputConfig(directory=_output(config.output.directory, settings)),
        "runtime": RuntimeConfig(seed=config.runtime.seed, device=config.runtime.device, threads=settings.threads),
    }
    return config.model_copy(update=changed)


def confined_path(key: str, place: str, settings: ServiceSettings) -> str:
    """An existing file or folder below a root, or a URL below an allowed prefix, as an absolute place.

    Raises:
        ConfigurationError: it is elsewhere, or not there; the two are not told apart.
    """
    path, url = local_or_url(place)
    if url is not None:
        return _allowed_url(key, url, settings)
    found = _below_roots(path, settings)
    if found is None:
        raise ConfigurationError(f"{key}: {place!r} is not below a root of this server")
    return str(found)


def _refuse_own_code(config: RunConfig, settings: ServiceSettings) -> None:
    """Functions that a configuration names (``module:function``) are code, which the operator must have allowed."""
    if config.model.trust_remote_code:
        raise ConfigurationError("model.trust_remote_code: this server runs no code of models; leave it out")
    asked = {
        "model.factory": config.model.factory,
        "model.loss": config.model.loss,
        "data.collate": config.data.collate,
    }
    if _names_code(config.data.source):
        asked["data.source"] = config.data.source
    for key, value in asked.items():
        if value is not None and not _allowed_code(value, settings):
            raise ConfigurationError(f"{key}: {_code_refused(value, value.partition(':')[0])}")


def runs_own_code(config: RunConfig) -> bool:
    """Whether a configuration names functions."""
    return bool(config.model.factory or config.model.loss or config.data.collate or _names_code(config.data.source))


def _code_refused(named: str, module: str) -> str:
    return f"this server does not run {named!r}; its operator can pass --allow-code {module}"


def _names_code(source: str) -> bool:
    return REFERENCE.fullmatch(source) is not None and not source.startswith(("builtin:", HUB_PREFIX))


def _allowed_code(reference: str, settings: ServiceSettings) -> bool:
    module = reference.partition(":")[0]
    return any(module == allowed or module.startswith(f"{allowed}.") for allowed in settings.allow_code)


def _model(config: ModelConfig, settings: ServiceSettings) -> str:
    """``name_or_path`` with its file or folder as an absolute place, if the operator allows what loading it does."""
    key, name = "model.name_or_path", config.name_or_path
    request = LoadRequest(name, config.task, weights=config.weights)
    trust = request.source.trust(request)
    if request.source.key != "name_or_path":
        return confined_path(key, name, settings)
    if trust.code and not _allowed_code(trust.code, settings):
        raise ConfigurationError(f"{key}: {_code_refused(name, trust.code)}")
    if trust.package and trust.package not in settings.allow_packages:
        raise ConfigurationError(
            f"{key}: this server does not import {name!r}; its operator can pass --allow-package {trust.package}"
        )
    if trust.pickle and not settings.allow_pickles:
        raise ConfigurationError(
            f"{key}: {name!r} is a pickle, which runs code when it is loaded; the operator can pass --allow-pickles"
        )
    if trust.hub and settings.allow_hub and not (trust.path and _below_roots(Path(trust.path), settings)):
        return name
    if not trust.path:
        return confined_path(key, name, settings) if trust.hub else name
    place = confined_path(key, trust.path, settings)
    return name.removesuffix(request.place) + place


def _data(source: str, settings: ServiceSettings) -> str:
    key = "data.source"
    if source.startswith("builtin:"):
        return source
    if _names_code(source):  # which _refuse_own_code has let pass
        return source
    if source.startswith(HUB_PREFIX):
        if source.removeprefix(HUB_PREFIX).startswith((".", "/", "~")):
            raise ConfigurationError(f"{key}: {source!r} is a folder of the server; give it without {HUB_PREFIX}")
        if settings.allow_hub:
            return source
        raise ConfigurationError(f"{key}: this server loads nothing from the hub; its operator can pass --allow-hub")
    return confined_path(key, source, settings)


def _output(directory: str, settings: ServiceSettings) -> str:
    """URLs only: what a job writes on the server lies in its own folder, and is fetched from there."""
    if directory == DEFAULT_OUTPUT:
        return directory
    _, url = local_or_url(directory)
    if url is None:
        raise ConfigurationError(
            f"output.directory: got {directory!r}; a job writes to its own folder on the server, from which you fetch "
            "it; leave it out, or give a URL that the server allows"
        )
    return _allowed_url("output.directory", url, settings)


def _below_roots(path: Path, settings: ServiceSettings) -> Path | None:
    """The real place of an existing ``path`` if that is below a root, links followed."""
    if "\0" in str(path):
        return None
    for root in settings.roots:
        real_root = root.resolve()
        try:
            found = (real_root / path).resolve(strict=True)
        except (OSError, RuntimeError, ValueError):  # not there, links that go round in circles, or no name of a file
            continue
        if found.is_relative_to(real_root):
            return found
    return None


def _allowed_url(key: str, url: str, settings: ServiceSettings) -> str:
    rest = unquote(url.partition("://")[2])
    clean = posixpath.normpath(rest) == rest.rstrip("/") and not any(mark in rest for mark in "?#\\\0*[")
    below = any(url == prefix.rstrip("/") or url.startswith(prefix.rstrip("/") + "/") for prefix in settings.allow_urls)
    if clean and below:
        return url
    allowed = ", ".join(settings.allow_urls) or "none"
    raise ConfigurationError(f"{key}: {url!r} is not below a URL that this server allows ({allowed})")


def check_contents(config: RunConfig, settings: ServiceSettings) -> None:
    """Look at what the files of a confined configuration are and name: when it comes, and again before it is used.

    Raises:
        ConfigurationError: names the file and what it names.
    """
    below = _is_below(settings)
    name = config.model.name_or_path
    request = LoadRequest(name, config.model.task, weights=config.model.weights)
    trust = request.source.trust(request)
    place = Path(trust.path) if trust.path else None
    if place is not None and place.is_absolute() and not trust.pickle and config.model.factory is None:
        shown = _as_given(place, settings)
        refuse_model_folder("model.name_or_path", shown, place, below, allow_pickles=settings.allow_pickles)
    data = Path(config.data.source)
    if data.is_absolute():
        refuse_data("data.source", _as_given(data, settings), data, below)


def _is_below(settings: ServiceSettings) -> Below:
    roots = [root.resolve() for root in settings.roots]

    def below(path: Path) -> bool:
        try:
            real = Path(os.path.realpath(path))
        except (OSError, ValueError):  # no file can have such a name: a zero byte, half a character
            return False
        return any(real.is_relative_to(root) for root in roots)

    return below


def _as_given(place: Path, settings: ServiceSettings) -> str:
    """A place without the root that it is below, which is no business of clients."""
    for root in settings.roots:
        if place.is_relative_to(root.resolve()):
            return place.relative_to(root.resolve()).as_posix()
    return place.name


async def receive_upload(chunks: AsyncIterator[bytes], folder: Path) -> tuple[Path, str]:
    """Write what comes to a temporary file; its path, and the SHA-256 of its content."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=".new-", suffix=".safetensors", dir=folder)
    digest = hashlib.sha256()
    try:
        with os.fdopen(descriptor, "wb") as file:
            async for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        os.unlink(name)
        raise
    return Path(name), digest.hexdigest()


def keep_upload(received: Path, sha256: str, folder: Path) -> ModelSpec:
    """Read a received file as ``layerlens optimize`` does, and keep it if it can be used.

    Raises:
        ActivationCacheError: it cannot; the message does not tell where it lay.
    """
    from layerlens.profiling.statistics_file import load_statistics

    try:
        spec, _ = load_statistics(received)
        os.replace(received, folder / f"{sha256}.safetensors")
        return spec
    except ActivationCacheError as error:
        raise ActivationCacheError(str(error).replace(str(received), "the file")) from error
    finally:
        received.unlink(missing_ok=True)


def statistics_path(given: str, settings: ServiceSettings, store: JobStore) -> str | None:
    """The file that ``upload:SHA256`` or ``job:ID`` means; None where ``given`` has neither form.

    Raises:
        ConfigurationError: there is no such upload, or no such run that succeeded.
    """
    upload, job = _UPLOAD.fullmatch(given), _JOB.fullmatch(given)
    if upload is not None:
        path = settings.state_dir / UPLOADS / f"{upload[1]}.safetensors"
        if not path.is_file():
            raise ConfigurationError(f"statistics: there is no {given}; send the file to POST /v1/statistics first")
        return str(path)
    if job is not None:
        found = store.get(job[1])
        path = settings.state_dir / JOBS / job[1] / RESULTS / STATISTICS_FILE
        if found is None or found.state != SUCCEEDED or not path.is_file():
            raise ConfigurationError(f"statistics: {given} is not a run that succeeded")
        return str(path)
    return None
