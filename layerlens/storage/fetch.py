"""Reading what lies at URLs, each object compared with its checksum where one was published, and copies of it on disk.

Copies lie in ``downloads`` of the cache directory under the hash of their URL and of what the store says of their
content, so that an object that has not changed is not fetched twice.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from layerlens.exceptions import ConfigurationError, OutputError, StorageError
from layerlens.storage.checksums import CHECKSUMS_FILE, Entry, entry_for, read_entries, sha256_of
from layerlens.storage.filesystem import files_below, joined, local_or_url, open_url, reading, redacted, safe_name
from layerlens.utils.atomic import cannot_write
from layerlens.utils.places import default_cache_dir

DOWNLOADS = "downloads"
ATTEMPTS, PAUSE_S = 5, 0.4
"""A result that is just being replaced matches its list again after a moment."""


def local_file(place: Path | str) -> Path:
    """``place`` if it is on this machine (whether it exists or not), or a verified local copy of the URL's object.

    Raises:
        StorageError: there is no such object, it cannot be read, or it does not match its checksum.
    """
    path, url = local_or_url(place)
    return path if url is None else local_copy(url)


def local_copy(url: str) -> Path:
    """A local copy of the object at ``url``, or of the directory of objects.

    Raises:
        ConfigurationError: the scheme is unknown or its driver missing.
        StorageError: nothing is there, it cannot be read, or a part does not match its checksum.
        OutputError: there is no room for the copy.
    """
    filesystem, path = open_url(url)
    with reading(url):
        found = files_below(filesystem, path)
        single = not found
        infos = {posixpath.basename(path): filesystem.info(path)} if single else found
        infos = {name: info for name, info in infos.items() if not posixpath.basename(name).startswith(".layerlens-")}
        listed = read_entries(filesystem, path) if not single else None
        target = default_cache_dir() / DOWNLOADS / _key(url, infos)
        if not target.is_dir():
            _download(url, filesystem, path, single, infos, listed, target)
    return target / posixpath.basename(path) if single else target


def _key(url: str, infos: dict[str, dict[str, Any]]) -> str:
    """Changes whenever an object does: its entity tag, or its size and time where the store has none."""
    facts = {
        name: [str(info.get(fact)) for fact in ("ETag", "etag", "size", "LastModified", "mtime", "created")]
        for name, info in infos.items()
    }
    return hashlib.sha256(json.dumps([url, facts], sort_keys=True).encode()).hexdigest()


def _download(
    url: str,
    filesystem: Any,
    path: str,
    single: bool,
    infos: dict[str, dict[str, Any]],
    listed: dict[str, Entry] | None,
    target: Path,
) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
    except OSError as error:
        raise cannot_write(target, error) from error
    try:
        for name in infos:
            if not safe_name(name):
                raise StorageError(f"{redacted(url)}: the store names an object {name!r}, which leads out of it")
            local = work / name
            local.parent.mkdir(parents=True, exist_ok=True)
            remote = path if single else f"{path}/{name}"
            filesystem.get_file(remote, str(local))
            expected = entry_for(filesystem, remote) if listed is None else listed.get(name)
            if expected is not None and name != CHECKSUMS_FILE and sha256_of(local) != expected["sha256"]:
                raise mismatch(url if single else joined(url, name))
        try:
            work.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster, with the same content
                raise
    except OSError as error:
        if isinstance(error, (StorageError, FileNotFoundError)) or error.errno is None:
            raise
        disk = cannot_write(target, error)
        raise (disk if isinstance(disk, OutputError) and error.errno == 28 else error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


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
        f"{redacted(url)}: does not match its checksum: it was changed, is being replaced, or was not fully published; "
        "read it again in a moment, or publish the result again"
    )
