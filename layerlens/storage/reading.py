"""Reading objects, each held against its checksum where one was published."""

from __future__ import annotations

import hashlib
import time

from layerlens.exceptions import ConfigurationError, StorageError
from layerlens.storage.checksums import entry_for
from layerlens.storage.filesystem import open_url, reading
from layerlens.storage.url import local_or_url, redacted

ATTEMPTS, PAUSE_S = 5, 0.4
"""A result that is just being replaced matches its list again after a moment."""


def read_bytes(url: str, limit: int | None = None) -> bytes:
    """The object at ``url``; of one that is larger than ``limit``, its first ``limit`` + 1 bytes, unchecked.

    Raises:
        ConfigurationError: the scheme is unknown or its driver missing.
        StorageError: there is no such object, the store cannot be reached, or the object does not match its checksum.
    """
    filesystem, path = open_url(url)
    with reading(url):
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(PAUSE_S)
            filesystem.invalidate_cache()
            expected = entry_for(filesystem, path)
            if limit is not None and filesystem.size(path) > limit:
                return bytes(filesystem.cat_file(path, start=0, end=limit + 1))
            data = bytes(filesystem.cat_file(path))
            if expected is None or hashlib.sha256(data).hexdigest() == expected["sha256"]:
                return data
    raise mismatch(url)


def read_text(url: str, limit: int) -> str:
    """The object as UTF-8 text.

    Raises:
        ConfigurationError: it is larger than ``limit`` bytes or not UTF-8.
        StorageError: see ``read_bytes``.
    """
    path, remote = local_or_url(url)
    data = path.read_bytes() if remote is None else read_bytes(remote, limit)
    if len(data) > limit:
        raise ConfigurationError(f"{redacted(url)}: larger than {limit // 1024} KiB; this is not a configuration file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{redacted(url)}: not UTF-8 text (byte {error.start})") from error


def mismatch(url: str) -> StorageError:
    """The error for an object that is not what was published."""
    return StorageError(
        f"{redacted(url)}: does not match its checksum: it was changed, is just being replaced, or a publication was "
        "cut short; read it again in a moment, or publish the result again"
    )
