"""One streamed answer of an OpenAI-compatible server, put together from its events, and the server's own times."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from layerlens.vision_language.generation import Tokens

_CUT = 120


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
            raise GarbageError(f"an event is no chunk of a chat completion: {shortened(data)}")
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
            raise GarbageError(f"the answer is no chat completion: {shortened(body)}") from error
        self.done = True
        self._figures(answer)

    def _choice(self, choice: Any, now: float, data: str) -> None:
        if not isinstance(choice, Mapping):
            raise GarbageError(f"an event is no chunk of a chat completion: {shortened(data)}")
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
