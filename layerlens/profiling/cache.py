"""The sensitivity cache: statistics kept by the content they were measured from.

An SQLite index maps a key (hash of model weights, data, settings and versions) to a safetensors blob and its SHA-256.
A blob that is missing, truncated or foreign does not match its checksum and counts as absent; it is never trusted.
Writing a blob is atomic and comes before its index row, so a run that dies leaves the cache as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layerlens.exceptions import ActivationCacheError, OutputError
from layerlens.models import ModelSpec, ModelStatistics
from layerlens.profiling.statistics_file import load_statistics, statistics_to_bytes
from layerlens.utils.atomic import atomic_write_bytes

BUSY_TIMEOUT_S = 30.0


def default_cache_dir() -> Path:
    """$LAYERLENS_CACHE, or ``layerlens`` in the user's cache directory."""
    if "LAYERLENS_CACHE" in os.environ:
        return Path(os.environ["LAYERLENS_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "layerlens"


def cache_key(content: dict[str, Any]) -> str:
    """SHA-256 of what determines the statistics, as canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
        with self._index() as index:
            row = index.execute("SELECT sha256 FROM statistics WHERE key = ?", (key,)).fetchone()
        path = self._blob(key)
        if row is None or not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != row[0]:
            return None
        try:
            return load_statistics(path)
        except ActivationCacheError:  # written whole, but by a version with another format: measured again
            return None

    def put(self, key: str, spec: ModelSpec, statistics: ModelStatistics) -> None:
        """Keep ``statistics`` under ``key``, in place of what was there."""
        data = statistics_to_bytes(spec, statistics)
        atomic_write_bytes(self._blob(key), data)
        with self._index() as index:
            index.execute(
                "INSERT OR REPLACE INTO statistics (key, sha256, model_name, n_samples, bytes) VALUES (?, ?, ?, ?, ?)",
                (key, hashlib.sha256(data).hexdigest(), spec.model_name, statistics.n_samples, len(data)),
            )

    def _blob(self, key: str) -> Path:
        return self.directory / "blobs" / f"{key}.safetensors"

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
