"""Statistics files that clients send, kept under the hash of their content once they have been read whole."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from layerlens.exceptions import ActivationCacheError, ConfigurationError
from layerlens.models import ModelSpec
from layerlens.service.settings import ServiceSettings
from layerlens.service.store import SUCCEEDED, JobStore
from layerlens.service.worker import JOBS, RESULTS, UPLOADS

STATISTICS_FILE = "statistics.safetensors"
_UPLOAD = re.compile(r"upload:([0-9a-f]{64})")
_JOB = re.compile(r"job:([0-9a-f]{32})")


async def receive(chunks: AsyncIterator[bytes], folder: Path) -> tuple[Path, str]:
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


def keep(received: Path, sha256: str, folder: Path) -> ModelSpec:
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
            raise ConfigurationError(f"statistics: {given} is no run that has succeeded")
        return str(path)
    return None
