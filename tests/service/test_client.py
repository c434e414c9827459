"""The client against servers that break off, send elsewhere, or are something else."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import TOKEN

from layerlens.exceptions import ConfigurationError, ServiceError
from layerlens.service import client as client_module
from layerlens.service.client import Client, ClientEvent

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, list[Answer]]], Client]]:
    """``answering({path: answers})``: a client of a server that gives these answers, the last one again and again."""
    monkeypatch.setattr(client_module, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(client_module.time, "sleep", lambda seconds: None)
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(answers: dict[str, list[Answer]]) -> Client:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                left = answers[self.path.partition("?")[0]]
                (left.pop(0) if len(left) > 1 else left[0])(self)

            def log_message(self, *_: Any) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return Client(f"http://127.0.0.1:{server.server_port}", TOKEN)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def answer(body: bytes, status: int = 200, length: int | None = None, **headers: str) -> Answer:
    def give(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"content_length": str(len(body) if length is None else length), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)
        handler.close_connection = True

    return give


def test_a_file_that_breaks_off_is_fetched_again_and_none_is_left_in_part(answering: Any, tmp_path: Path):
    result = answer(json.dumps({"files": {"report": "report.html"}}).encode())
    whole, cut = answer(b"0123456789"), answer(b"0123", length=10)
    client = answering({"/v1/jobs/a/result": [result], "/v1/jobs/a/files/report.html": [cut, whole]})
    assert [path.read_bytes() for path in client.download("a", tmp_path / "out")] == [b"0123456789"]
    client = answering({"/v1/jobs/a/result": [result], "/v1/jobs/a/files/report.html": [cut]})
    with pytest.raises(ServiceError, match="cannot be reached"):
        client.download("a", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    out = answer(json.dumps({"files": {"report": "../report.html"}}).encode())
    with pytest.raises(ServiceError, match="outside of the directory"):
        answering({"/v1/jobs/a/result": [out]}).download("a", tmp_path / "out")


def test_events_go_on_after_the_last_whole_one(answering: Any):
    def event(number: int, state: str) -> bytes:
        return f'id: {number}\nevent: state\ndata: {{"state": "{state}"}}\n\n'.encode()

    seen: list[str] = []
    kind = {"content_type": "text/event-stream"}
    first = b"retry: 2000\n\n" + event(1, "queued") + b": still here\n\nid: 2\nevent: state\ndata: {"
    then = answer(event(2, "running") + event(3, "succeeded"), **kind)

    def again(handler: http.server.BaseHTTPRequestHandler) -> None:
        seen.append(str(handler.headers["Last-Event-ID"]))
        then(handler)

    client = answering({"/v1/jobs/a/events": [answer(first, length=10_000, **kind), again]})
    states = ["queued", "running", "succeeded"]
    found = [ClientEvent(number, "state", {"state": state}) for number, state in enumerate(states, 1)]
    assert list(client.events("a")) == found
    assert seen == ["1"]


def test_refusals_have_the_servers_words_and_the_token_goes_nowhere_else(answering: Any):
    elsewhere: list[str] = []

    def gone(handler: http.server.BaseHTTPRequestHandler) -> None:
        elsewhere.append(handler.path)

    busy = answer(b'{"detail": "3 jobs are already waiting"}', 503, retry_after="1")
    client = answering({"/v1/jobs/a": [busy]})
    with pytest.raises(ServiceError, match="3 jobs are already waiting"):
        client.job("a")
    client = answering({"/v1/jobs/a": [answer(b"", 307, location="/other")], "/other": [gone]})
    with pytest.raises(ServiceError, match="answered 307"):
        client.job("a")
    assert not elsewhere
    with pytest.raises(ServiceError, match="does not answer with JSON; is it a LayerLens server"):
        answering({"/v1/jobs/a": [answer(b"<html>")]}).job("a")


@pytest.mark.parametrize(
    ("server", "token", "words"),
    [
        ("http://[::1", "", "not an address like"),
        ("ftp://host", "", "not an address like"),
        ("http://127.0.0.1:port", "", "not an address like"),
        ("http://127.0.0.1:8642", "a token\n", "the token has spaces"),
        ("http://127.0.0.1:8642", "tökén", "the token has spaces or other characters"),
    ],
)
def test_what_no_client_can_be_made_of(server: str, token: str, words: str):
    with pytest.raises(ConfigurationError, match=words) as caught:
        Client(server, token)
    assert not token or token not in str(caught.value)
