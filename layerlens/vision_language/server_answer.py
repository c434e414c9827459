"""One streamed answer of an OpenAI-compatible server: events from bytes, the answer from events, and its times."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from typing import Any

from layerlens.vision_language.generation import Communication, Tokens

_LINE_END = re.compile(rb"\r\n|\n|\r")


class EventParser:
    """Fed with pieces of any size, gives back whole events."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> list[str]:
        """The data of the events that ``piece`` completes.

        Raises:
            UnicodeDecodeError: the stream is not UTF-8.
        """
        self._rest += piece
        events = []
        while (match := _LINE_END.search(self._rest)) is not None:
            if match.group() == b"\r" and match.end() == len(self._rest):
                break  # its \n may be in the next piece
            line, self._rest = self._rest[: match.start()], self._rest[match.end() :]
            if line:
                self._field(line.decode("utf-8"))
            elif self._data:
                events.append("\n".join(self._data))
                self._data = []
        return events

    @property
    def unfinished(self) -> bool:
        """The stream ends in the middle of an event."""
        return bool(self._rest.strip() or self._data)

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")
        if name == "data":
            self._data.append(value.removeprefix(" "))


_CUT = 120
BOUNDS = "the server reports no times: between connecting and sending, and everything except waiting for tokens"


class GarbageError(Exception):
    """The server sent something that is not what the protocol says."""


class ServerError(Exception):
    """The server reported an error inside its stream."""


class Answer:
    """What has arrived so far.

    Args:
        started: when the request was sent, on the clock of ``time.perf_counter``.
    """

    def __init__(self, started: float) -> None:
        self.tokens = Tokens(started)
        self.pieces: list[str] = []
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] = {}
        self.server_ms: float | None = None
        self.done = False

    @property
    def text(self) -> str:
        """All pieces."""
        return "".join(self.pieces)

    def event(self, data: str) -> None:
        """Take in the data of one event that has just arrived.

        Raises:
            GarbageError: it is not a chunk of a chat completion.
            ServerError: the server reports an error.
        """
        now = time.perf_counter()
        if data.strip() == "[DONE]":
            self.done = True
            return
        chunk = parse_json(data)
        if chunk.get("error"):
            raise ServerError(error_words(chunk))
        choices = chunk.get("choices")
        if not isinstance(choices, list):
            raise GarbageError(f"an event is not a chunk of a chat completion: {shortened(data)}")
        for choice in choices[:1]:
            self._choice(choice, now, data)
        self._figures(chunk)

    def whole(self, body: str) -> None:
        """Take in an answer in one piece, from a server that does not stream.

        Raises:
            GarbageError: it is not a chat completion.
            ServerError: it is an error.
        """
        answer = parse_json(body)
        if answer.get("error"):
            raise ServerError(error_words(answer))
        try:
            choice = answer["choices"][0]
            self.pieces.append(str(choice["message"]["content"] or ""))
            self.finish_reason = choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise GarbageError(f"the answer is not a chat completion: {shortened(body)}") from error
        self.done = True
        self._figures(answer)

    def _choice(self, choice: Any, now: float, data: str) -> None:
        if not isinstance(choice, Mapping):
            raise GarbageError(f"an event is not a chunk of a chat completion: {shortened(data)}")
        delta = choice.get("delta") or {}
        content = delta.get("content") if isinstance(delta, Mapping) else None
        thought = (delta.get("reasoning_content") or delta.get("reasoning")) if isinstance(delta, Mapping) else None
        if isinstance(content, str) and content:
            self.pieces.append(content)
        if content or thought:  # both are tokens that were waited for
            self.tokens.times.append(now)
        self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def _figures(self, chunk: Mapping[str, Any]) -> None:
        usage = chunk.get("usage") or (chunk.get("x_groq") or {}).get("usage")
        if isinstance(usage, Mapping):
            self.usage = {**self.usage, **usage}
            if isinstance(usage.get("total_time"), int | float):  # Groq, in seconds
                self.server_ms = 1e3 * (usage["total_time"] + (usage.get("queue_time") or 0.0))
        timings = chunk.get("timings")
        if isinstance(timings, Mapping) and {"prompt_ms", "predicted_ms"} <= timings.keys():  # llama.cpp
            self.server_ms = float(timings["prompt_ms"]) + float(timings["predicted_ms"])
        if isinstance(chunk.get("total_duration"), int | float):  # Ollama, in nanoseconds
            self.server_ms = 1e-6 * chunk["total_duration"]


def parse_json(text: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        GarbageError: it is something else.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GarbageError(f"not JSON: {shortened(text)}") from error
    if not isinstance(value, dict):
        raise GarbageError(f"not a JSON object: {shortened(text)}")
    return value


def error_words(body: Mapping[str, Any]) -> str:
    """The server's own words for an error, in a line."""
    error = body.get("error", body.get("detail", body))
    if isinstance(error, Mapping):
        error = error.get("message") or json.dumps(error)
    return shortened(str(error))


def shortened(text: str) -> str:
    """One line, its beginning."""
    line = " ".join(text.split())
    return line if len(line) <= _CUT else line[:_CUT] + "…"


class Trace:
    """Listens to httpx's transport: when the connection stood, and when the request was out."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.connected: float | None = None
        self.sent: float | None = None

    def __call__(self, name: str, _info: Mapping[str, Any]) -> None:
        if name in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self.connected = time.perf_counter()
        elif name.endswith("send_request_body.complete"):
            self.sent = time.perf_counter()


def header_ms(headers: Mapping[str, str]) -> float | None:
    """The server's time until it sent the head, where a header has it (OpenAI and those who follow it)."""
    try:
        return float(headers["openai-processing-ms"])
    except (KeyError, ValueError):
        return None


def step_times(
    trace: Trace, headers: float, answer: Answer, reported_ms: float | None, end: float
) -> tuple[dict[str, float], Communication]:
    """Milliseconds of every step of a request, and how much of them is communication.

    Args:
        trace: when the connection stood and the request was out.
        headers, end: when the response's head and its end were there.
        answer: with the times of its tokens, and the server's own time where it told it.
        reported_ms: what ``header_ms`` found.
    """
    times = answer.tokens.times or [end]
    connected = trace.connected or trace.started
    sent = max(connected, trace.sent or connected)
    steps = {
        "llm_connect": 1e3 * (connected - trace.started),
        "llm_send": 1e3 * (sent - connected),
        "llm_first_token": 1e3 * (times[0] - sent),
        "llm_decode": 1e3 * (times[-1] - times[0]),
        "llm_finish": 1e3 * (end - times[-1]),
    }
    wall, lower = sum(steps.values()), steps["llm_connect"] + steps["llm_send"]
    if answer.server_ms is not None:
        value = max(0.0, wall - answer.server_ms)
        note = f"the server reports {answer.server_ms:.3f} ms of its own"
        return steps, Communication("client time minus server time", value, value, value, note)
    head = 1e3 * (min(headers, times[0]) - sent)
    if reported_ms is not None:
        value = lower + max(0.0, head - reported_ms) + steps["llm_finish"]
        note = f"the response's head reports {reported_ms:g} ms until it was sent"
        return steps, Communication("client time minus server time", value, value, value, note)
    return steps, Communication("bounds", None, lower, lower + head + steps["llm_finish"], BOUNDS)
