"""Small real HTTP servers: one that does what a script says, and a proxy that sees every byte of an answer pass by."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Handler = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]
TEXT = ("Nodule ", "in ", "the ", "upper ", "left.")


class Script:
    """What a server does, request by request; the last entry goes on for ever.

    Args:
        steps: called with the request's handler and its JSON body.
    """

    def __init__(self, *steps: Handler) -> None:
        self.steps, self.requests, self.headers = list(steps), [], []

    def __call__(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        self.requests.append(body)
        self.headers.append({name.lower(): value for name, value in handler.headers.items()})
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        step(handler, body)


@contextmanager
def serving(script: Handler, models: tuple[str, ...] = ("tiny",)) -> Iterator[str]:
    """The base URL of a server that follows ``script``."""

    class Requests(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            send(self, 200, json.dumps({"data": [{"id": name} for name in models]}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            script(self, body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Requests)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


def send(
    handler: BaseHTTPRequestHandler, status: int, text: str, kind: str = "application/json", **headers: str
) -> None:
    """A whole response."""
    data = text.encode()
    handler.send_response(status)
    for name, value in {"content-type": kind, "content-length": str(len(data)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def begin_stream(handler: BaseHTTPRequestHandler, **headers: str) -> None:
    """The head of a stream of events; it ends with the connection."""
    handler.send_response(200)
    for name, value in {"content-type": "text/event-stream", "connection": "close", **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.close_connection = True


def event(handler: BaseHTTPRequestHandler, value: Any) -> None:
    """One event, sent at once."""
    text = value if isinstance(value, str) else json.dumps(value)
    handler.wfile.write(f"data: {text}\n\n".encode())
    handler.wfile.flush()


def chunk(content: str | None = None, finish: str | None = None, **others: Any) -> dict[str, Any]:
    """A chunk of a chat completion."""
    delta = {} if content is None else {"content": content}
    return {
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
        **others,
    }


def answering(pause_s: float = 0.0, last: dict[str, Any] | None = None, **headers: str) -> Handler:
    """A good answer of TEXT, ``pause_s`` before each token, with ``last`` in its last chunk."""

    def step(handler: BaseHTTPRequestHandler, _body: dict[str, Any]) -> None:
        begin_stream(handler, **headers)
        for word in TEXT:
            time.sleep(pause_s)
            event(handler, chunk(word))
        event(handler, chunk(finish="stop", **(last or {"usage": {"prompt_tokens": 7, "completion_tokens": 5}})))
        event(handler, "[DONE]")

    return step


class WatchingProxy:
    """Forwards requests to ``target``, noting when each event with text arrived from there.

    It is a client of the server in its own right: another HTTP library, another clock reading, the same answer.

    Args:
        target: host:port of the server.
        on_token: called with the number of tokens so far, before the token is passed on.
    """

    def __init__(self, target: str, on_token: Callable[[int], None] = lambda count: None) -> None:
        self.target, self.on_token = target, on_token
        self.answers: list[list[float]] = []

    def __call__(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        connection = http.client.HTTPConnection(self.target, timeout=60)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            send(handler, response.status, response.read().decode())
            return
        begin_stream(handler)
        times: list[float] = []
        self.answers.append(times)
        try:
            for line in response:  # as soon as a line is there
                if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    times.append(time.perf_counter())
                    self.on_token(len(times))
                handler.wfile.write(line)
                handler.wfile.flush()
        except (http.client.HTTPException, OSError):
            pass  # the server is gone; the client sees its connection end
        finally:
            connection.close()
