"""A sensitivity cache in an object store: what one machine measured, the others need not measure.

``index/KEY.json`` names the SHA-256 of the blob in ``blobs/SHA256.safetensors``. Blobs are put before the index that
names them and are never rewritten, so several machines may use one cache. Every blob is held against its name when it
is read. The local cache stays in front. A store that cannot be reached costs time, not the run: it is
told in a warning, and the model is measured here.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from layerlens.exceptions import ActivationCacheError, StorageError
from layerlens.models import ModelSpec, ModelStatistics
from layerlens.profiling.cache import SensitivityCache
from layerlens.profiling.statistics_file import load_statistics, statistics_to_bytes
from layerlens.storage import local_or_url, redacted
from layerlens.storage.filesystem import open_url, reason
from layerlens.utils.places import default_cache_dir

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
