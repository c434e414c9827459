"""A client of the server, with the standard library only.

client = Client("http://127.0.0.1:8642")
job = client.submit_run(Path("config.yaml"))
for event in client.events(job["id"]):
    print(event.type, event.data)
client.download(job["id"], Path("out"))
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from layerlens.exceptions import ConfigurationError, ServiceError
from layerlens.utils.atomic import staged_directory

TOKEN_VARIABLE, SERVER_VARIABLE = "LAYERLENS_TOKEN", "LAYERLENS_SERVER"
DEFAULT_SERVER = "http://127.0.0.1:8642"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
FINAL = ("succeeded", "failed", "cancelled")
PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class ClientEvent:
    """One event: its number, its type (state, stage, progress, warning) and its data."""

    id: int
    type: str
    data: dict[str, Any]


class Client:
    """One server.

    Args:
        server: its address; $LAYERLENS_SERVER or http://127.0.0.1:8642 when not given.
        token: $LAYERLENS_TOKEN when not given.
        timeout_s: for each answer; event streams may be silent as long as the server sends its heartbeats.
        allow_http: send a token over plain HTTP to another machine.

    Raises:
        ConfigurationError: no http(s) address, or a token would go over the network in the clear.
    """

    def __init__(
        self, server: str | None = None, token: str | None = None, *, timeout_s: float = 60.0, allow_http: bool = False
    ) -> None:
        self.server = (server or os.environ.get(SERVER_VARIABLE) or DEFAULT_SERVER).rstrip("/")
        self._token = token or os.environ.get(TOKEN_VARIABLE) or None
        self.timeout_s = timeout_s
        parts = urlsplit(self.server)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ConfigurationError(
                f"--server: {parts.scheme}://{parts.hostname} is no address like https://host:8642"
            )
        if self._token and parts.scheme == "http" and parts.hostname not in LOOPBACK and not allow_http:
            raise ConfigurationError(
                f"--server: the token would go to {parts.hostname} unencrypted; use https, or --allow-http in a "
                "network that you trust"
            )

    def submit(
        self,
        kind: str,
        config: str | Mapping[str, Any],
        *,
        statistics: str | None = None,
        idempotency_key: str | None = None,
        traceparent: str | None = None,
    ) -> dict[str, Any]:
        """Queue a job; safe to be sent twice, so it is, when the connection breaks before the answer.

        Raises:
            ServiceError: the server cannot be reached or refuses the job.
        """
        body: dict[str, Any] = {"kind": kind, "config": config}
        if statistics is not None:
            body["statistics"] = statistics
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        context = traceparent or os.environ.get("TRACEPARENT")
        if context:
            headers["traceparent"] = context
        return self._json("POST", "/v1/jobs", json.dumps(body).encode(), headers, again=True)

    def submit_run(self, config: Path | str | Mapping[str, Any], **options: Any) -> dict[str, Any]:
        """Queue a run of a configuration: its file, its YAML text, or its values."""
        return self.submit("run", _content(config), **options)

    def submit_optimization(
        self, config: Path | str | Mapping[str, Any], statistics: Path | str, **options: Any
    ) -> dict[str, Any]:
        """Queue an optimisation from a local statistics file, which is sent, or from ``job:ID``, ``upload:...``."""
        reference = self.upload(statistics) if isinstance(statistics, Path) else statistics
        return self.submit("optimize", _content(config), statistics=reference, **options)

    def upload(self, statistics: Path) -> str:
        """Send a statistics file; what to give as ``statistics`` of an optimisation."""
        try:
            data = statistics.read_bytes()
        except OSError as error:
            raise ConfigurationError(f"{statistics}: cannot be read: {error.strerror}") from error
        found = self._json("POST", "/v1/statistics", data, {"Content-Type": "application/octet-stream"}, again=True)
        return str(found["statistics"])

    def job(self, job_id: str) -> dict[str, Any]:
        """State of a job."""
        return self._json("GET", f"/v1/jobs/{quote(job_id, safe='')}", again=True)

    def jobs(self, *, state: str | None = None, limit: int = 50) -> list[dict[str, Any]]:
        """The newest jobs."""
        query = {"limit": str(limit)} | ({"state": state} if state else {})
        found: list[dict[str, Any]] = self._json("GET", f"/v1/jobs?{urlencode(query)}", again=True)["jobs"]
        return found

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Cancel a job that has not ended."""
        return self._json("POST", f"/v1/jobs/{quote(job_id, safe='')}/cancel", b"")

    def result(self, job_id: str) -> dict[str, Any]:
        """Result of a job that succeeded."""
        return self._json("GET", f"/v1/jobs/{quote(job_id, safe='')}/result", again=True)

    def events(self, job_id: str, last_event_id: int = 0) -> Iterator[ClientEvent]:
        """Everything that happens to a job until it has ended; goes on after broken connections and restarts.

        Raises:
            ServiceError: the server stays out of reach.
        """
        failures = 0
        while True:
            try:
                with self._open(
                    "GET",
                    f"/v1/jobs/{quote(job_id, safe='')}/events",
                    headers={"Last-Event-ID": str(last_event_id), "Accept": "text/event-stream"},
                ) as response:
                    for event in read_events(response):
                        failures, last_event_id = 0, event.id
                        yield event
                        if event.type == "state" and event.data["state"] in FINAL:
                            return
                if self.job(job_id)["state"] in FINAL:
                    return
            except Unavailable as error:  # too many streams, or a restart; how the job stands can be asked
                if self.job(job_id)["state"] in FINAL:
                    if failures == len(PAUSES_S):
                        raise ServiceError(f"{self.server}: the job has ended, and its events {error}") from error
                    failures += 1
                time.sleep(PAUSES_S[max(0, failures - 1)] if failures else 1.0)
            except (OSError, http.client.HTTPException) as error:
                if failures == len(PAUSES_S):
                    raise ServiceError(f"{self.server}: the connection is lost ({_reason(error)})") from error
                time.sleep(PAUSES_S[failures])
                failures += 1

    def wait(self, job_id: str) -> dict[str, Any]:
        """Follow a job to its end; its last state."""
        for _ in self.events(job_id):
            pass
        return self.job(job_id)

    def download(self, job_id: str, directory: Path) -> list[Path]:
        """Fetch every file of a result; all of them appear at once, or none.

        Raises:
            ServiceError: the job has no result, or a name leads out of ``directory``.
            OutputError: ``directory`` cannot be written.
        """
        names = sorted(set(self.result(job_id)["files"].values()))
        with staged_directory(directory) as staging:
            for name in names:
                if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                    raise ServiceError(f"{self.server}: names a file {name!r}, which leads out of the directory")
                target = staging / name
                target.parent.mkdir(parents=True, exist_ok=True)
                path = f"/v1/jobs/{quote(job_id, safe='')}/files/{quote(name)}"
                with self._retried("GET", path) as response, target.open("wb") as file:
                    while piece := response.read(1 << 20):
                        file.write(piece)
        return [directory / name for name in names]

    def _json(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        again: bool = False,
    ) -> dict[str, Any]:
        with (self._retried if again else self._once)(method, path, body, headers) as response:
            found: dict[str, Any] = json.loads(response.read())
            return found

    def _once(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str] | None) -> Any:
        try:
            return self._open(method, path, body, headers)
        except (OSError, http.client.HTTPException, Unavailable) as error:
            raise ServiceError(
                f"{self.server}: cannot be reached ({_reason(error)}); is the server running?"
            ) from error

    def _retried(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Any:
        """Once more after a broken connection, or when the server asks to wait."""
        for pause in PAUSES_S:
            try:
                return self._open(method, path, body, headers)
            except Unavailable as error:
                time.sleep(max(pause, error.wait_s))
            except (OSError, http.client.HTTPException):
                time.sleep(pause)
        return self._once(method, path, body, headers)

    def _open(self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> Any:
        sent = {"Content-Type": "application/json", "Accept": "*/*", **(headers or {})}
        if self._token:
            sent["Authorization"] = f"Bearer {self._token}"
        request = urllib.request.Request(self.server + path, data=body, headers=sent, method=method)
        try:
            return _opener.open(request, timeout=self.timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                detail = _detail(error)
                if error.code in (429, 503):
                    raise Unavailable(detail, error.headers.get("Retry-After", "")) from error
            raise ServiceError(f"{self.server}: {detail}") from error


class Unavailable(Exception):
    """The server asks to come back later."""

    def __init__(self, detail: str, retry_after: str) -> None:
        super().__init__(detail)
        self.wait_s = min(30.0, float(retry_after)) if retry_after.isdigit() else 0.0


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A token is not carried to where an answer points."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirects)


def read_events(lines: Iterable[bytes]) -> Iterator[ClientEvent]:
    """Server-sent events (the WHATWG format) of a stream of lines, without comments and what was cut off at the end.

    >>> list(read_events([b": hello\\n", b"id: 7\\n", b"event: state\\n", b'data: {"state": "queued"}\\n', b"\\n"]))
    [ClientEvent(id=7, type='state', data={'state': 'queued'})]
    """
    fields: dict[str, str] = {}
    for raw in lines:
        line = raw.decode("utf-8").rstrip("\r\n")
        if not line:
            if "data" in fields:
                data = json.loads(fields["data"])
                yield ClientEvent(int(fields.get("id", 0)), fields.get("event", "message"), data)
            fields = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            fields[name] = f"{fields['data']}\n{value}" if name == "data" and "data" in fields else value


def _content(config: Path | str | Mapping[str, Any]) -> str | Mapping[str, Any]:
    if not isinstance(config, Path):
        return config
    try:
        return config.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{config}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _detail(error: urllib.error.HTTPError) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError, OSError):
        return str(json.loads(error.read(1 << 20))["detail"])
    return f"answered {error.code} {error.reason}"


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    return str(getattr(reason, "strerror", None) or reason or type(error).__name__)
