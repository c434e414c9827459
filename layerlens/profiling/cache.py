"""The sensitivity cache: statistics kept by the content they were measured from, on this machine or at a URL.

An SQLite index maps a key (hash of model weights, data, settings and versions) to a safetensors blob and its SHA-256.
A blob that is missing, truncated or foreign does not match its checksum and counts as absent; it is never trusted.
A blob lies beside its place until its index row is there, so a run that dies at any time leaves what was kept before or
what it was about to keep.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ActivationCacheError, OutputError, StorageError
from layerlens.models import ModelSpec, ModelStatistics
from layerlens.profiling.proxies import SavedProxies
from layerlens.profiling.statistics_file import load_statistics, statistics_to_bytes
from layerlens.storage import local_or_url, redacted
from layerlens.storage.filesystem import open_url, reason
from layerlens.utils.atomic import atomic_write_bytes
from layerlens.utils.places import default_cache_dir

if TYPE_CHECKING:
    from layerlens.profiling.saved_pass import SavedPass

BUSY_TIMEOUT_S = 30.0
PROXIES, PARTIAL, STREAM, RUN = ".proxies", ".partial", ".stream", ".run"
SUFFIXES = {PROXIES: ".json", RUN: ".zip"}
"""Of blobs that hold no tensors."""
TENSORS, NEW = ".safetensors", ".new"
BLOBS = (TENSORS, *SUFFIXES.values())


def cache_key(content: dict[str, Any]) -> str:
    """SHA-256 of what determines the statistics, as canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class CacheEntry:
    """What is kept under one key.

    Args:
        key: as ``cache_key`` made it, with ``.partial`` for a pass that was interrupted (``.partial-1`` for what
            process 1 of several had measured), ``.stream`` for what is kept of a streamed one, ``.proxies`` for
            measured gains of options, and ``.run`` for the results of a whole run.
        model_name, n_samples: what was measured; "?" for a file that is not in the index.
        bytes: size of the blob.
        created_at: UTC, as SQLite writes it.
        state: "ok", "damaged" (does not match its checksum), "missing" (no blob) or "foreign" (not in the index).
    """

    key: str
    model_name: str
    n_samples: int
    bytes: int
    created_at: str
    state: str


class SensitivityCache:
    """Statistics by key, in one directory that several processes may use at once.

    Raises:
        OutputError: the directory cannot be created or written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            (directory / "blobs").mkdir(parents=True, exist_ok=True)
            with self._index():
                pass
        except (OSError, sqlite3.DatabaseError) as error:
            raise OutputError(
                f"runtime.cache_dir: cannot use {directory} ({error}); give a writable directory, remove a damaged "
                "index.sqlite, or run with --no-cache"
            ) from error

    def get(self, key: str) -> tuple[ModelSpec, ModelStatistics] | None:
        """What is kept under ``key``; None when it is absent or its blob does not match its checksum."""
        if self._read(key) is None:
            return None
        try:
            return load_statistics(self._blob(key))
        except ActivationCacheError:  # written whole, but by a version with another format: measured again
            return None

    def put(self, key: str, spec: ModelSpec, statistics: ModelStatistics) -> None:
        """Keep ``statistics`` under ``key``, in place of what was there."""
        self._keep(key, statistics_to_bytes(spec, statistics), spec.model_name, statistics.n_samples)
        parts = _Parts(self, key)
        parts.remove(parts.names())

    def saved_pass(self, key: str, time_share: float | None = None) -> SavedPass:
        """Where an unfinished pass for ``key`` is kept, until its statistics are."""
        from layerlens.profiling.saved_pass import SHARE_OF_TIME, SavedPass  # it needs torch

        return SavedPass(_Parts(self, key), SHARE_OF_TIME if time_share is None else time_share)

    def stream_directory(self, key: str) -> Path:
        """Where a streamed profile for ``key`` keeps its activations and what is finished, until it is done."""
        return self.directory / "streams" / key

    def saved_proxies(self, key: str, model_name: str, n_samples: int) -> SavedProxies:
        """Where the gains of single options are kept for ``key``, from the first one on."""
        entry = f"{key}{PROXIES}"
        return SavedProxies(lambda: self._read(entry), lambda data: self._keep(entry, data, model_name, n_samples))

    def kept_run(self, key: str) -> bytes | None:
        """The results of a run that are kept under ``key``; None when they are absent or damaged."""
        return self._read(f"{key}{RUN}")

    def keep_run(self, key: str, content: bytes, model_name: str) -> None:
        """Keep the results of a run under ``key``, in place of what was there."""
        self._keep(f"{key}{RUN}", content, model_name, 0)

    def entries(self) -> list[CacheEntry]:
        """Everything in the cache, oldest first, each blob read and compared with its checksum."""
        with self._index() as index:
            rows = index.execute(
                "SELECT key, sha256, model_name, n_samples, bytes, created_at FROM statistics ORDER BY created_at, key"
            ).fetchall()
        entries = []
        for key, sha256, model_name, n_samples, size, created_at in rows:
            missing = not self._blob(key).is_file()
            state = "missing" if missing else "ok" if self._checked(key, sha256) is not None else "damaged"
            entries.append(CacheEntry(key, model_name, n_samples, size, created_at, state))
        known = {self._blob(entry.key).name for entry in entries}
        for path in sorted(x for x in (self.directory / "blobs").iterdir() if x.suffix in BLOBS):
            if path.name not in known:
                entries.append(CacheEntry(path.stem, "?", 0, path.stat().st_size, "", "foreign"))
        for path in sorted((self.directory / "streams").glob("*")):
            size = sum(one.stat().st_blocks * 512 for one in path.rglob("*"))
            made = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
            entries.append(CacheEntry(f"{path.name}{STREAM}", "unfinished pass", 0, size, made, "ok"))
        return entries

    def remove(self, keys: Iterable[str]) -> None:
        """Forget these entries, index rows first, so that a reader never finds a row whose blob has just gone.

        Raises:
            ActivationCacheError: a streamed profile is being made at this time.
        """
        for key in keys:
            if key.endswith(STREAM):
                self._remove_stream(self.directory / "streams" / key.removesuffix(STREAM))
                continue
            with self._index() as index:
                index.execute("DELETE FROM statistics WHERE key = ?", (key,))
            self._blob(key).unlink(missing_ok=True)
            for left in (self.directory / "blobs").glob(f"{key}.{16 * '?'}{NEW}"):  # by runs that died
                left.unlink(missing_ok=True)

    def _remove_stream(self, directory: Path) -> None:
        with suppress(FileNotFoundError), (directory / "lock").open("rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ActivationCacheError(
                    f"{directory} belongs to a running profile; remove it when the profile has ended"
                ) from error
        shutil.rmtree(directory, ignore_errors=True)

    def _keep(self, key: str, data: bytes, model_name: str, n_samples: int) -> None:
        sha256 = hashlib.sha256(data).hexdigest()
        new = atomic_write_bytes(self._new_blob(key, sha256), data)
        with self._index() as index:
            index.execute(
                "INSERT OR REPLACE INTO statistics (key, sha256, model_name, n_samples, bytes) VALUES (?, ?, ?, ?, ?)",
                (key, sha256, model_name, n_samples, len(data)),
            )
        _moved(new, self._blob(key))

    def _read(self, key: str) -> bytes | None:
        """The bytes under ``key``; None when they are absent or do not match their checksum."""
        with self._index() as index:
            row = index.execute("SELECT sha256 FROM statistics WHERE key = ?", (key,)).fetchone()
        return None if row is None else self._checked(key, row[0])

    def _checked(self, key: str, sha256: str) -> bytes | None:
        """The blob's bytes, None when they do not match the checksum."""
        _moved(self._new_blob(key, sha256), self._blob(key))  # whoever wrote it has died before
        try:
            data = self._blob(key).read_bytes()
        except FileNotFoundError:
            return None
        return data if hashlib.sha256(data).hexdigest() == sha256 else None

    def _blob(self, key: str) -> Path:
        return self.directory / "blobs" / f"{key}{SUFFIXES.get(Path(key).suffix, TENSORS)}"

    def _new_blob(self, key: str, sha256: str) -> Path:
        """Where a blob lies until its row is in the index."""
        return self.directory / "blobs" / f"{key}.{sha256[:16]}{NEW}"

    def _keys_from(self, prefix: str) -> list[str]:
        """The keys in the index that begin like this."""
        with self._index() as index:
            rows = index.execute("SELECT key FROM statistics WHERE substr(key, 1, ?) = ?", (len(prefix), prefix))
            return [key for (key,) in rows]

    @contextmanager
    def _index(self) -> Iterator[sqlite3.Connection]:
        """One transaction on the index."""
        connection = sqlite3.connect(self.directory / "index.sqlite", timeout=BUSY_TIMEOUT_S)
        try:
            with connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS statistics (key TEXT PRIMARY KEY, sha256 TEXT NOT NULL, "
                    "model_name TEXT NOT NULL, n_samples INTEGER NOT NULL, bytes INTEGER NOT NULL, "
                    "created_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP)"
                )
                yield connection
        finally:
            connection.close()


def _moved(new: Path, place: Path) -> None:
    with suppress(FileNotFoundError):
        os.replace(new, place)


class _Parts:
    """The parts of an unfinished pass as entries of the cache: ``KEY.partial``, ``KEY.partial-1`` ..."""

    def __init__(self, cache: SensitivityCache, key: str) -> None:
        self.cache, self.first = cache, f"{key}{PARTIAL}"

    def names(self) -> list[int]:
        ends = (entry.removeprefix(self.first) for entry in self.cache._keys_from(self.first))
        return [int(end[1:] or 0) for end in ends]

    def read(self, part: int) -> bytes | None:
        return self.cache._read(self._entry(part))

    def write(self, part: int, data: bytes) -> None:
        self.cache._keep(self._entry(part), data, "unfinished pass", 0)

    def remove(self, parts: Iterable[int]) -> None:
        self.cache.remove(map(self._entry, parts))

    def _entry(self, part: int) -> str:
        return f"{self.first}-{part}" if part else self.first


logger = logging.getLogger(__name__)


def open_cache(given: str | None, base_dir: Path) -> SensitivityCache:
    """The cache that ``runtime.cache_dir`` means: the default one, a directory below ``base_dir``, or a URL.

    Raises:
        ConfigurationError: a URL whose scheme is unknown or whose driver is missing.
        OutputError: the directory cannot be used.
    """
    if given is None:
        return SensitivityCache(default_cache_dir())
    path, url = local_or_url(given)
    if url is not None:
        return SharedCache(url)
    return SensitivityCache(base_dir / path.expanduser())


class SharedCache(SensitivityCache):
    """The local cache, and behind it the one at ``url``."""

    def __init__(self, url: str) -> None:
        super().__init__(default_cache_dir())
        self.url = url
        self.filesystem, self.root = open_url(url)

    def get(self, key: str) -> tuple[ModelSpec, ModelStatistics] | None:
        """What the local cache keeps under ``key``, or else the store; that is kept here too."""
        found = super().get(key)
        if found is not None:
            return found
        try:
            data = self._fetch(key)
        except Exception as error:  # drivers share no base class; a cache must not fail a run
            self._warn("cannot be read, so the model is measured here", error)
            return None
        if data is None:
            return None
        self._keep(key, data, "", 0)
        try:
            spec, statistics = load_statistics(self._blob(key))
        except ActivationCacheError:  # another version's format
            self.remove([key])
            return None
        self._keep(key, data, spec.model_name, statistics.n_samples)
        return spec, statistics

    def put(self, key: str, spec: ModelSpec, statistics: ModelStatistics) -> None:
        """Keep ``statistics`` here and in the store."""
        super().put(key, spec, statistics)
        data = statistics_to_bytes(spec, statistics)
        sha256 = hashlib.sha256(data).hexdigest()
        index: dict[str, Any] = {"sha256": sha256, "bytes": len(data), "model_name": spec.model_name}
        index["n_samples"] = statistics.n_samples
        try:
            blob = f"{self.root}/blobs/{sha256}.safetensors"
            self.filesystem.invalidate_cache()
            if not self.filesystem.exists(blob):
                self.filesystem.pipe_file(blob, data)
            self.filesystem.pipe_file(f"{self.root}/index/{key}.json", json.dumps(index).encode())
        except Exception as error:  # as in get
            self._warn("cannot be written, so the statistics are kept here only", error)

    def _fetch(self, key: str) -> bytes | None:
        self.filesystem.invalidate_cache()
        try:
            index = json.loads(self.filesystem.cat_file(f"{self.root}/index/{key}.json"))
            sha256 = str(index["sha256"])
            data = bytes(self.filesystem.cat_file(f"{self.root}/blobs/{sha256}.safetensors"))
        except FileNotFoundError:
            return None
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StorageError(f"the statistics under {key[:12]} do not match their checksum")
        return data

    def _warn(self, what: str, error: Exception) -> None:
        logger.warning("runtime.cache_dir: %s %s (%s)", redacted(self.url), what, reason(error))
