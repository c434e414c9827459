"""A client of the server.

client = Client("http://127.0.0.1:8642")
job = client.submit_run(Path("config.yaml"))
for event in client.events(job["id"]):
    print(event.type, event.data)
client.download(job["id"], Path("out"))
"""

from __future__ import annotations

import json
import os
import re
import shlex
import ssl
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import httpx
from httpx_sse import EventSource

from layerlens.exceptions import ConfigurationError, ServiceError
from layerlens.utils.atomic import staged_directory

TOKEN_VARIABLE, SERVER_VARIABLE = "LAYERLENS_TOKEN", "LAYERLENS_SERVER"
DEFAULT_SERVER = "http://127.0.0.1:8642"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
FINAL = ("succeeded", "failed", "cancelled")
PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0)
MOST_DETAIL_BYTES = 1 << 20
NOT_JSON = "does not answer with JSON; is it a LayerLens server?"

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class ClientEvent:
    """One event of a job: its number, its type (state, stage, progress or warning) and its data."""

    id: int
    type: str
    data: dict[str, Any]


class Client:
    """A client of one LayerLens server.

    Args:
        server: address of the server; by default $LAYERLENS_SERVER, else http://127.0.0.1:8642.
        token: access token; by default $LAYERLENS_TOKEN.
        timeout_s: maximum seconds for each answer. Event streams stay open while the server sends heartbeats.
        allow_http: allow sending the token over plain HTTP to another machine.

    Raises:
        ConfigurationError: not an http(s) address, or the token would be sent without encryption.
    """

    def __init__(
        self, server: str | None = None, token: str | None = None, *, timeout_s: float = 60.0, allow_http: bool = False
    ) -> None:
        self.server = (server or os.environ.get(SERVER_VARIABLE) or DEFAULT_SERVER).rstrip("/")
        token = token or os.environ.get(TOKEN_VARIABLE) or None
        try:
            parts = urlsplit(self.server)
            known = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc
            httpx.URL(self.server)
        except (ValueError, httpx.InvalidURL):
            known = False
        if not known:
            shown = self.server.rpartition("@")[2]  # a password is not repeated
            raise ConfigurationError(f"--server: {shown} is not an address like https://host:8642")
        if token and not re.fullmatch(r"[\x21-\x7e]+", token):
            raise ConfigurationError("the token has spaces or other characters that no token has; copy it again")
        if token and parts.scheme == "http" and parts.hostname not in LOOPBACK and not allow_http:
            raise ConfigurationError(
                f"--server: the token would go to {parts.hostname} unencrypted; use https, or --allow-http in a "
                "network that you trust"
            )
        self._http = httpx.Client(
            base_url=self.server,
            headers={"Authorization": f"Bearer {token}"} if token else None,
            timeout=timeout_s,
            # Certificates that the machine trusts: certifi's, httpx's own choice, lack those of a company.
            verify=ssl.create_default_context() if parts.scheme == "https" else True,
            limits=httpx.Limits(max_keepalive_connections=0),  # a server that was restarted has closed what was kept
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
        """Queue a job. If the connection breaks before the answer, the client sends the request again.

        The server queues the job only once.

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
        return self._json("POST", "/v1/jobs", again=True, json=body, headers=headers)

    def submit_run(self, config: Path | str | Mapping[str, Any], **options: Any) -> dict[str, Any]:
        """Queue a run. The configuration is a file, YAML text, or a mapping."""
        return self.submit("run", _content(config), **options)

    def submit_optimization(
        self, config: Path | str | Mapping[str, Any], statistics: Path | str, **options: Any
    ) -> dict[str, Any]:
        """Queue an optimisation from statistics: a local file (the client uploads it), ``job:ID`` or ``upload:...``."""
        reference = self.upload(statistics) if isinstance(statistics, Path) else statistics
        return self.submit("optimize", _content(config), statistics=reference, **options)

    def upload(self, statistics: Path) -> str:
        """Upload a statistics file, and return the value for ``statistics`` of an optimisation."""
        try:
            data = statistics.read_bytes()
        except OSError as error:
            raise ConfigurationError(f"{statistics}: cannot be read: {error.strerror}") from error
        headers = {"Content-Type": "application/octet-stream"}
        found = self._json("POST", "/v1/statistics", again=True, content=data, headers=headers)
        return str(found["statistics"])

    def job(self, job_id: str) -> dict[str, Any]:
        """The state of a job."""
        return self._json("GET", f"/v1/jobs/{quote(job_id, safe='')}", again=True)

    def jobs(self, *, state: str | None = None, limit: int = 50) -> list[dict[str, Any]]:
        """The newest jobs."""
        query = {"limit": str(limit)} | ({"state": state} if state else {})
        found: list[dict[str, Any]] = self._json("GET", "/v1/jobs", again=True, params=query)["jobs"]
        return found

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Cancel a job that has not ended."""
        return self._json("POST", f"/v1/jobs/{quote(job_id, safe='')}/cancel")

    def result(self, job_id: str) -> dict[str, Any]:
        """The result of a job that succeeded."""
        return self._json("GET", f"/v1/jobs/{quote(job_id, safe='')}/result", again=True)

    def events(self, job_id: str, last_event_id: int = 0) -> Iterator[ClientEvent]:
        """Yield the events of a job until it ends. The stream continues after broken connections and restarts.

        Raises:
            ServiceError: the server cannot be reached again.
        """
        failures = 0
        while True:
            try:
                headers = {"Last-Event-ID": str(last_event_id), "Accept": "text/event-stream"}
                with self._answer("GET", f"/v1/jobs/{quote(job_id, safe='')}/events", headers=headers) as response:
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
            except ValueError as error:
                raise ServiceError(f"{self.server}: {NOT_JSON}") from error
            except httpx.RequestError as error:
                if failures == len(PAUSES_S):
                    raise ServiceError(f"{self.server}: the connection is lost ({_reason(error)})") from error
                time.sleep(PAUSES_S[failures])
                failures += 1

    def wait(self, job_id: str) -> dict[str, Any]:
        """Wait for the end of a job, and return its final state."""
        for _ in self.events(job_id):
            pass
        return self.job(job_id)

    def download(self, job_id: str, directory: Path) -> list[Path]:
        """Download all files of a result into ``directory``. They appear together, or not at all.

        Raises:
            ServiceError: the job has no result, or a file name leads out of ``directory``.
            OutputError: ``directory`` cannot be written.
        """
        names = sorted(set(self.result(job_id)["files"].values()))
        with staged_directory(directory) as staging:
            for name in names:
                if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                    raise ServiceError(f"{self.server}: names a file {name!r} outside of the directory")
                target = staging / name
                target.parent.mkdir(parents=True, exist_ok=True)
                path = f"/v1/jobs/{quote(job_id, safe='')}/files/{quote(name)}"
                self._retried(partial(self._fetch, path, target))
        return [directory / name for name in names]

    def _fetch(self, path: str, target: Path) -> None:
        with self._answer("GET", path) as response, target.open("wb") as file:
            for piece in response.iter_bytes():
                file.write(piece)

    def _json(self, method: str, path: str, *, again: bool = False, **request: Any) -> dict[str, Any]:
        def ask() -> dict[str, Any]:
            with self._answer(method, path, **request) as response:
                found: dict[str, Any] = json.loads(response.read())
                return found

        try:
            return (self._retried if again else self._once)(ask)
        except ValueError as error:
            raise ServiceError(f"{self.server}: {NOT_JSON}") from error

    def _once(self, ask: Callable[[], Answer]) -> Answer:
        try:
            return ask()
        except (httpx.RequestError, Unavailable) as error:
            raise ServiceError(
                f"{self.server}: cannot be reached ({_reason(error)}); is the server running?"
            ) from error

    def _retried(self, ask: Callable[[], Answer]) -> Answer:
        """Once more after a broken connection, or when the server asks to wait."""
        for pause in PAUSES_S:
            try:
                return ask()
            except Unavailable as error:
                time.sleep(max(pause, error.wait_s))
            except httpx.RequestError:
                time.sleep(pause)
        return self._once(ask)

    @contextmanager
    def _answer(self, method: str, path: str, **request: Any) -> Iterator[httpx.Response]:
        """An answer whose body is still to be read; redirects are not followed, so the token stays at this server."""
        with self._http.stream(method, path, **request) as response:
            if response.status_code >= 300:
                detail = _detail(response)
                if response.status_code in (429, 503):
                    raise Unavailable(detail, response.headers.get("Retry-After", ""))
                raise ServiceError(f"{self.server}: {detail}")
            yield response


class Unavailable(Exception):
    """The server asks to come back later."""

    def __init__(self, detail: str, retry_after: str) -> None:
        super().__init__(detail)
        self.wait_s = min(30.0, float(retry_after)) if retry_after.isdigit() else 0.0


def read_events(response: httpx.Response) -> Iterator[ClientEvent]:
    """The events of an answer; what only keeps the connection open, or was cut off at the end, is left out."""
    for event in EventSource(response).iter_sse():
        if event.data:
            yield ClientEvent(int(event.id or 0), event.event, event.json())


def _content(config: Path | str | Mapping[str, Any]) -> str | Mapping[str, Any]:
    if not isinstance(config, Path):
        return config
    try:
        return config.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        command = shlex.join(["layerlens", "init", str(config)])
        raise ConfigurationError(f"no configuration file at {config}; write one with: {command}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{config}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _detail(response: httpx.Response) -> str:
    """Why the server refuses: its own words, or the status where the beginning of the body has none."""
    body = b""
    with suppress(ValueError, KeyError, TypeError, httpx.RequestError):
        for piece in response.iter_bytes():
            body += piece
            if len(body) > MOST_DETAIL_BYTES:
                break
        return str(json.loads(body)["detail"])
    return f"answered {response.status_code} {response.reason_phrase}"


def _reason(error: Exception) -> str:
    return re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
