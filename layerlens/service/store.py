"""Jobs and their events in SQLite: what a server that was killed still knows.

Order is the order of numbers that SQLite gives, never that of clocks: a clock that goes backwards changes what is
shown, not what is done. Every change is one transaction, on disk when it returns.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

DATABASE, JOBS, UPLOADS, CACHE = "jobs.sqlite", "jobs", "uploads", "cache"
"""What lies in the state directory; each job has a folder in ``JOBS``, and its results in ``RESULTS`` there."""
RESULTS = "results"
QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED = "queued", "running", "succeeded", "failed", "cancelled"
STATES = (QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED)
FINAL = (SUCCEEDED, FAILED, CANCELLED)
BUSY_TIMEOUT_S, PROBE_TIMEOUT_S = 30.0, 5.0

_TABLES = """
CREATE TABLE IF NOT EXISTS jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    state TEXT NOT NULL,
    config TEXT NOT NULL,
    statistics TEXT,
    traceparent TEXT,
    idempotency_key TEXT UNIQUE,
    attempts INTEGER NOT NULL DEFAULT 0,
    deaths INTEGER NOT NULL DEFAULT 0,
    cancel_requested INTEGER NOT NULL DEFAULT 0,
    created_at TEXT NOT NULL,
    started_at TEXT,
    finished_at TEXT,
    exit_code INTEGER,
    error TEXT,
    outcome TEXT
);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, seq);
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    job TEXT NOT NULL,
    type TEXT NOT NULL,
    data TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS events_by_job ON events (job, seq);
CREATE TABLE IF NOT EXISTS probe (id INTEGER PRIMARY KEY CHECK (id = 1), content BLOB);
"""


@dataclass(frozen=True)
class Job:
    """One row of the table of jobs."""

    seq: int
    id: str
    kind: str
    state: str
    config: dict[str, Any]
    statistics: str | None
    traceparent: str | None
    idempotency_key: str | None
    attempts: int
    deaths: int
    cancel_requested: bool
    created_at: str
    started_at: str | None
    finished_at: str | None
    exit_code: int | None
    error: str | None
    outcome: dict[str, Any] | None

    @property
    def final(self) -> bool:
        return self.state in FINAL

    @property
    def model(self) -> str | None:
        """What its configuration calls the model."""
        section = self.config.get("model") or {}
        return section.get("name_or_path") or section.get("factory")

    @property
    def data(self) -> str | None:
        """What its configuration calls the data."""
        source = (self.config.get("data") or {}).get("source")
        return None if source is None else str(source)


@dataclass(frozen=True)
class Event:
    """Something that happened to a job: its state changed, a stage began or ended, steps were done, a warning."""

    seq: int
    type: str
    data: dict[str, Any]


class JobStore:
    """All jobs of one server; several processes may use it at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        database = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)
        database.execute("PRAGMA journal_mode=WAL")
        database.close()
        with self._transaction() as database:
            for statement in _TABLES.split(";"):
                database.execute(statement)

    def add(
        self,
        kind: str,
        config: Mapping[str, Any],
        *,
        statistics: str | None = None,
        traceparent: str | None = None,
        idempotency_key: str | None = None,
        max_queued: int | None = None,
    ) -> Job | None:
        """Queue a job; the one that was queued with the same key if there is one; None when too many wait."""
        with self._transaction() as database:
            if idempotency_key is not None:
                known = database.execute("SELECT * FROM jobs WHERE idempotency_key = ?", (idempotency_key,)).fetchone()
                if known is not None:
                    return _job(known)
            if max_queued is not None:
                (waiting,) = database.execute("SELECT count(*) FROM jobs WHERE state = ?", (QUEUED,)).fetchone()
                if waiting >= max_queued:
                    return None
            job_id = uuid.uuid4().hex
            database.execute(
                "INSERT INTO jobs (id, kind, state, config, statistics, traceparent, idempotency_key, created_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (job_id, kind, QUEUED, json.dumps(config), statistics, traceparent, idempotency_key, _now()),
            )
            _tell(database, job_id, "state", {"state": QUEUED})
            return _get(database, job_id)

    def get(self, job_id: str) -> Job | None:
        """The job with this id."""
        with self._reading() as database:
            return _get(database, job_id)

    def listed(self, *, state: str | None = None, before: int | None = None, limit: int = 50) -> list[Job]:
        """Jobs, newest first."""
        given = {name: value for name, value in (("state = ?", state), ("seq < ?", before)) if value is not None}
        query = f"SELECT * FROM jobs WHERE {' AND '.join(['1', *given])} ORDER BY seq DESC LIMIT ?"
        with self._reading() as database:
            return [_job(row) for row in database.execute(query, (*given.values(), limit)).fetchall()]

    def counts(self) -> dict[str, int]:
        """How many jobs are in each state."""
        with self._reading() as database:
            found = dict(database.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall())
        return {state: found.get(state, 0) for state in STATES}

    def claim(self) -> Job | None:
        """The job that has waited longest, now running; None when none waits."""
        with self._transaction() as database:
            row = database.execute("SELECT id FROM jobs WHERE state = ? ORDER BY seq LIMIT 1", (QUEUED,)).fetchone()
            if row is None:
                return None
            database.execute(
                "UPDATE jobs SET state = ?, attempts = attempts + 1, started_at = ? WHERE id = ?",
                (RUNNING, _now(), row[0]),
            )
            job = _get(database, row[0])
            assert job is not None
            _tell(database, job.id, "state", {"state": RUNNING, "attempt": job.attempts})
            return job

    def requeue(self, job_id: str, why: str, *, died: bool = False) -> None:
        """A running job waits again; ``died`` counts that its process ended by itself."""
        with self._transaction() as database:
            changed = database.execute(
                "UPDATE jobs SET state = ?, deaths = deaths + ? WHERE id = ? AND state = ?",
                (QUEUED, int(died), job_id, RUNNING),
            )
            if changed.rowcount:
                _tell(database, job_id, "state", {"state": QUEUED, "why": why})

    def finish(
        self,
        job_id: str,
        state: str,
        *,
        exit_code: int = 0,
        error: str | None = None,
        outcome: Mapping[str, Any] | None = None,
    ) -> bool:
        """Give a job its last state; False when it had one already."""
        error, outcome = printable(error), printable(outcome)
        with self._transaction() as database:
            changed = database.execute(
                "UPDATE jobs SET state = ?, finished_at = ?, exit_code = ?, error = ?, outcome = ? "
                "WHERE id = ? AND state IN (?, ?)",
                (state, _now(), exit_code, error, outcome and json.dumps(outcome), job_id, QUEUED, RUNNING),
            )
            if changed.rowcount:
                _tell(database, job_id, "state", {"state": state} | ({"error": error} if error else {}))
            return bool(changed.rowcount)

    def cancel(self, job_id: str) -> Job | None:
        """Cancel a waiting job, ask a running one to end; the job as it is then."""
        with self._transaction() as database:
            job = _get(database, job_id)
            if job is None or job.final:
                return job
            database.execute("UPDATE jobs SET cancel_requested = 1 WHERE id = ?", (job_id,))
            if job.state == QUEUED:
                database.execute(
                    "UPDATE jobs SET state = ?, finished_at = ?, exit_code = 130 WHERE id = ?",
                    (CANCELLED, _now(), job_id),
                )
                _tell(database, job_id, "state", {"state": CANCELLED})
            return _get(database, job_id)

    def remove(self, job_id: str) -> bool:
        """Forget a job that has ended; False when it has not."""
        with self._transaction() as database:
            gone = database.execute(
                f"DELETE FROM jobs WHERE id = ? AND state IN ({', '.join('?' * len(FINAL))})", (job_id, *FINAL)
            )
            if gone.rowcount:
                database.execute("DELETE FROM events WHERE job = ?", (job_id,))
            return bool(gone.rowcount)

    def tell(self, job_id: str, kind: str, data: Mapping[str, Any]) -> None:
        """Add an event."""
        with self._transaction() as database:
            _tell(database, job_id, kind, data)

    def events(self, job_id: str, after: int = 0, limit: int = 1000) -> list[Event]:
        """The events of a job after the one with number ``after``."""
        with self._reading() as database:
            rows = database.execute(
                "SELECT seq, type, data FROM events WHERE job = ? AND seq > ? ORDER BY seq LIMIT ?",
                (job_id, after, limit),
            ).fetchall()
        return [Event(seq, kind, json.loads(data)) for seq, kind, data in rows]

    def last_event(self) -> int:
        """Number of the newest event of all jobs."""
        with self._reading() as database:
            (found,) = database.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()
        return int(found)

    def probe(self, content: bytes) -> None:
        """Write ``content`` and remove it again, each on disk when done, as a submission would be.

        Raises:
            sqlite3.Error: why that is not possible.
        """
        try:
            with self._transaction(timeout_s=PROBE_TIMEOUT_S) as database:
                database.execute("INSERT OR REPLACE INTO probe (id, content) VALUES (1, ?)", (content,))
        finally:
            with contextlib.suppress(sqlite3.Error), self._transaction(timeout_s=PROBE_TIMEOUT_S) as database:
                database.execute("DELETE FROM probe")

    @contextmanager
    def _transaction(
        self, begin: str = "BEGIN IMMEDIATE", *, timeout_s: float = BUSY_TIMEOUT_S
    ) -> Iterator[sqlite3.Connection]:
        """One transaction; it takes the lock at once, so that nothing changes between what it reads and writes."""
        database = sqlite3.connect(self.path, timeout=timeout_s, isolation_level=None)
        try:
            database.execute("PRAGMA synchronous=FULL")
            database.execute(begin)
            try:
                yield database
            except BaseException:
                if database.in_transaction:  # SQLite has ended it itself where the disk is full
                    database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")
        finally:
            database.close()

    def _reading(self) -> AbstractContextManager[sqlite3.Connection]:
        return self._transaction("BEGIN")


def printable(value: Any) -> Any:
    """The same JSON value with every text in characters that UTF-8 has.

    Names of files that are no UTF-8 have lone surrogates in Python, which neither SQLite nor an answer takes.

    >>> printable({"error": "cannot read a\\udcff.txt"})
    {'error': 'cannot read a\\\\udcff.txt'}
    """
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {printable(name): printable(one) for name, one in value.items()}
    return [printable(one) for one in value] if isinstance(value, list | tuple) else value


def _get(database: sqlite3.Connection, job_id: str) -> Job | None:
    row = database.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
    return None if row is None else _job(row)


def _job(row: tuple[Any, ...]) -> Job:
    fields = dict(zip(Job.__dataclass_fields__, row, strict=True))
    fields["config"] = json.loads(fields["config"])
    fields["cancel_requested"] = bool(fields["cancel_requested"])
    fields["outcome"] = fields["outcome"] and json.loads(fields["outcome"])
    return Job(**fields)


def _tell(database: sqlite3.Connection, job_id: str, kind: str, data: Mapping[str, Any]) -> None:
    content = json.dumps({"at": _now(), **printable(data)})
    database.execute("INSERT INTO events (job, type, data) VALUES (?, ?, ?)", (job_id, kind, content))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
