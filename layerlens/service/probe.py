"""Whether a submission could be written now: asked by writing one's like, not by reading what is there."""

from __future__ import annotations

import os
import sqlite3
import tempfile
import threading
import time

from layerlens.service.settings import ServiceSettings
from layerlens.service.store import JOBS, JobStore

EVERY_S = 1.0


class Probe:
    """Writes as much as the largest submission has, as a row of the store and as a file where jobs have theirs.

    Whoever asks within a second of the last time gets its answer, so that the question costs no more than that.
    """

    def __init__(self, store: JobStore, settings: ServiceSettings) -> None:
        self.store, self.settings = store, settings
        self.lock = threading.Lock()
        self.last = float("-inf")
        self.failed: OSError | sqlite3.Error | None = None

    def write(self) -> None:
        """Raise what a submission would meet.

        Raises:
            OSError, sqlite3.Error: the state directory is full, lost, read-only or locked.
        """
        with self.lock:
            if time.monotonic() - self.last > EVERY_S:
                self.failed = self._written()
                self.last = time.monotonic()
            if self.failed is not None:
                raise self.failed

    def _written(self) -> OSError | sqlite3.Error | None:
        content = os.urandom(self.settings.max_body_bytes)  # some file systems store zeros as nothing
        folder = self.settings.state_dir / JOBS
        try:
            self.store.probe(content)
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, sqlite3.Error) as error:
            return error
        return None


def reason_of(error: Exception) -> str:
    """What the system says, without the place, which is no business of clients."""
    return str(getattr(error, "strerror", None) or (error.args[-1] if error.args else error))
