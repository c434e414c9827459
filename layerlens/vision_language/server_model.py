"""Any OpenAI-compatible server (vLLM, Ollama, llama.cpp, transformers serve, Groq ...) as a language model.

One request is traced through connecting, sending, waiting for the response's head, tokens and end of the stream.
Requests that may yet succeed (no connection, 408, 429, 5xx, a stream that breaks off) are repeated with growing pauses.
"""

from __future__ import annotations

import os
import random
import time
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx

from layerlens.exceptions import ConfigurationError
from layerlens.vision_language.generation import Communication, Generation, GenerationError
from layerlens.vision_language.server_answer import (
    Answer,
    EventParser,
    GarbageError,
    ServerError,
    Trace,
    error_words,
    header_ms,
    parse_json,
    shortened,
    step_times,
)

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
HINTS = {401: "; set api_key_env", 403: "; set api_key_env", 404: "; check base URL and llm_model"}
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
MOST_BYTES = 16 * 1024 * 1024
CONNECT_S = 10.0


class _Attempt(Exception):
    """One request failed."""

    def __init__(self, reason: str, *, again: bool, wait_s: float | None = None, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.again, self.wait_s, self.unreachable = again, wait_s, unreachable


class _UsageRefused(Exception):
    """The server does not know ``stream_options``."""


class ServerModel:
    """A chat model behind ``base_url``.

    Args:
        base_url: such as http://localhost:8000/v1; "/v1" is added where there is no path.
        model: the server's name for it; its only model when None.
        api_key_env: environment variable with the key, which is sent as a bearer token and recorded nowhere.
        timeout_s: longest time for one answer.
        retries: how often a request is repeated.

    Raises:
        ConfigurationError: the URL is not one, or the variable is not set.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None = None,
        api_key_env: str | None = None,
        timeout_s: float = 120.0,
        retries: int = 3,
    ) -> None:
        self.base_url, self.model, self.timeout_s, self.retries = _base(base_url), model, timeout_s, retries
        headers = {}
        if api_key_env is not None:
            key = os.environ.get(api_key_env)
            if not key:
                raise ConfigurationError(f"api_key_env: the environment variable {api_key_env} is not set")
            headers["Authorization"] = f"Bearer {key}"
            self.base_url = _without_user(self.base_url)  # a user in the URL would be sent instead of the key
        limits = httpx.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s))
        self._client = httpx.Client(headers=headers, timeout=limits)
        self._usage_wanted = True
        self._unreachable = False

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def describe(self) -> dict[str, Any]:
        """Where it is and what it is called; no key."""
        return {"kind": "OpenAI-compatible server", "base_url": _without_user(self.base_url), "name": self.model}

    def generate(self, messages: list[dict[str, str]], max_new_tokens: int) -> Generation:
        """The answer at temperature 0, streamed.

        Raises:
            GenerationError: no whole answer after all attempts; a server that nobody reached the last time is tried
                once only.
        """
        begun = time.perf_counter()
        failures: list[str] = []
        allowed = 1 if self._unreachable else 1 + self.retries
        partial = ""
        for attempt in range(1, allowed + 1):
            answer = Answer(time.perf_counter())
            try:
                steps, communication, streamed = self._request(messages, max_new_tokens, answer)
            except _Attempt as failure:
                partial = answer.text or partial
                failures.append(str(failure))
                self._unreachable = failure.unreachable
                pause = failure.wait_s if failure.wait_s is not None else _pause(attempt)
                if not failure.again or attempt == allowed or pause > LONGEST_PAUSE_S:
                    asks = f"; it asks to wait {pause:.0f} s" if failure.again and pause > LONGEST_PAUSE_S else ""
                    often = f" ({attempt} attempts)" if attempt > 1 else ""
                    raise GenerationError(
                        f"{failure}{asks}{often}", partial_text=partial, attempts=attempt,
                        steps_ms={"llm_failed": 1e3 * (time.perf_counter() - begun)},
                        unreachable=failure.unreachable,
                    ) from failure  # fmt: skip
                time.sleep(pause)
                continue
            self._unreachable = False
            # Building the request, asking for the model's name, and attempts that failed with their pauses.
            steps = {"llm_prepare": 1e3 * (answer.tokens.started - begun), **steps}
            return self._generation(answer, steps, communication, attempt, streamed, tuple(failures))
        raise AssertionError("unreachable")  # the loop returns or raises

    def _generation(
        self,
        answer: Answer,
        steps: dict[str, float],
        communication: Communication,
        attempts: int,
        streamed: bool,
        failures: tuple[str, ...],
    ) -> Generation:
        counted, times = answer.usage.get("completion_tokens"), answer.tokens.times
        # An end token is counted by some servers and shown by none; more than that is several tokens to a chunk.
        single = not isinstance(counted, int) or counted <= len(times) + 1
        return Generation(
            text=answer.text.strip(),
            steps_ms=steps,
            time_to_first_token_ms=answer.tokens.first_ms if streamed else None,
            token_ms=answer.tokens.intervals_ms,
            token_unit="token" if single else "chunk",
            prompt_tokens=answer.usage.get("prompt_tokens"),
            completion_tokens=counted if isinstance(counted, int) else (len(times) if streamed else None),
            finish_reason=answer.finish_reason,
            communication=communication,
            attempts=attempts,
            streamed=streamed,
            failures=failures,
        )

    def _request(
        self, messages: list[dict[str, str]], max_new_tokens: int, answer: Answer
    ) -> tuple[dict[str, float], Communication, bool]:
        try:
            return self._request_once(messages, max_new_tokens, answer)
        except _UsageRefused:
            self._usage_wanted = False  # transformers serve refuses to be asked, and sends the usage all the same
            return self._request_once(messages, max_new_tokens, answer)

    def _request_once(
        self, messages: list[dict[str, str]], max_new_tokens: int, answer: Answer
    ) -> tuple[dict[str, float], Communication, bool]:
        trace, headers, reported, streamed = Trace(), 0.0, None, True
        body: dict[str, Any] = {
            "model": self._name(), "messages": messages, "max_tokens": max_new_tokens, "temperature": 0, "stream": True,
        }  # fmt: skip
        if self._usage_wanted:
            body["stream_options"] = {"include_usage": True}
        answer.tokens.started = trace.started = time.perf_counter()
        try:
            with self._client.stream(
                "POST", f"{self.base_url}/chat/completions", json=body, extensions={"trace": trace}
            ) as response:
                headers = time.perf_counter()
                if response.status_code != 200:
                    self._refused(response)
                reported = header_ms(response.headers)
                streamed = "json" not in response.headers.get("content-type", "")
                self._read(response, answer, streamed)
        except (GarbageError, ServerError) as error:
            raise _Attempt(f"the server sent {_what(error)}{_after(answer)}", again=False) from error
        except httpx.HTTPError as error:
            if not answer.done:  # else all is there, and only the connection did not end well
                raise self._failed(error, answer) from error
        except httpx.InvalidURL as error:
            raise _Attempt(f"llm: {error}", again=False) from error
        return (*step_times(trace, headers, answer, reported, time.perf_counter()), streamed)

    def _read(self, response: Any, answer: Answer, streamed: bool) -> None:
        parser, size, whole = EventParser(), 0, b""
        begun = answer.tokens.started
        for piece in response.iter_bytes():
            size += len(piece)
            if size > MOST_BYTES:
                raise GarbageError(f"more than {MOST_BYTES >> 20} MiB")
            if time.perf_counter() - begun > self.timeout_s:
                raise _Attempt(f"no complete answer within {self.timeout_s:g} s{_after(answer)}", again=True)
            if not streamed:
                whole += piece
                continue
            try:
                events = parser.feed(piece)
            except UnicodeDecodeError as error:
                raise GarbageError("bytes that are not UTF-8") from error
            for data in events:
                answer.event(data)
        if answer.done:  # the rest was read as well, so that the connection can be used again
            return
        if not streamed:
            answer.whole(whole.decode("utf-8", "replace"))
        elif answer.finish_reason is None:  # some servers leave [DONE] out, none the reason why they stopped
            if not answer.tokens.times and not answer.usage and size and not response.headers.get(
                "content-type", ""
            ).startswith("text/event-stream"):  # fmt: skip
                raise GarbageError("no stream of events")
            raise _Attempt(f"the stream broke off{_after(answer)}", again=True)

    def _refused(self, response: Any) -> None:
        """Turn a status other than 200 into what to do about it."""
        text = b"".join(_first_bytes(response, 64 * 1024)).decode("utf-8", "replace")
        try:
            words = error_words(parse_json(text))
        except GarbageError:
            words = shortened(text) or "no reason given"
        status = response.status_code
        if self._usage_wanted and status in (400, 422) and "stream_options" in text:
            raise _UsageRefused
        again = status in RETRIED
        wait = _retry_after(response.headers.get("retry-after")) if again else None
        raise _Attempt(f"the server answered {status}: {words}{HINTS.get(status, '')}", again=again, wait_s=wait)

    def _failed(self, error: Exception, answer: Answer) -> _Attempt:
        words = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            shown = self.describe()["base_url"]
            return _Attempt(f"no answer at {shown} ({words})", again=True, unreachable=True)
        if isinstance(error, httpx.TimeoutException):
            return _Attempt(f"no answer within {self.timeout_s:g} s{_after(answer)}", again=True)
        if isinstance(error, httpx.RemoteProtocolError | httpx.ReadError | httpx.WriteError) and answer.tokens.times:
            return _Attempt(f"the stream broke off{_after(answer)}", again=True)
        return _Attempt(f"the connection failed: {words}", again=True)

    def _name(self) -> str:
        """The model's name, asked from the server where none was given."""
        if self.model is not None:
            return self.model
        try:
            listed = self._client.get(f"{self.base_url}/models")
            names = [str(entry["id"]) for entry in listed.json()["data"]]
        except httpx.HTTPError as error:
            raise self._failed(error, Answer(0.0)) from error
        except (ValueError, KeyError, TypeError) as error:
            raise _Attempt("the server does not list its models; name one with llm_model", again=False) from error
        if len(names) != 1:
            there = f"offers {', '.join(names[:8])}" if names else "lists no model"
            raise _Attempt(f"the server {there}; name one with llm_model", again=False)
        self.model = names[0]
        return self.model


def _base(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError(f"llm: {url!r} is not the URL of a server; use one such as http://localhost:8000/v1")
    return urlunsplit(parts._replace(path=parts.path.rstrip("/") or "/v1"))


def _without_user(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _pause(attempt: int) -> float:
    """Seconds before the next attempt: doubling, with up to a quarter taken off at random so that clients part."""
    return float(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (attempt - 1)) * random.uniform(0.75, 1.0))


def _retry_after(value: str | None) -> float | None:
    """Seconds that the header asks to wait (RFC 9110, section 10.2.3)."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(timezone.utc)).total_seconds())
    except (TypeError, ValueError):
        return None


def _first_bytes(response: Any, most: int) -> list[bytes]:
    pieces, size = [], 0
    for piece in response.iter_bytes():
        pieces.append(piece)
        size += len(piece)
        if size > most:
            break
    return pieces


def _what(error: Exception) -> str:
    return f"an error: {error}" if isinstance(error, ServerError) else f"garbage: {error}"


def _after(answer: Answer) -> str:
    count = len(answer.tokens.times)
    return f" after {count} token{'s' if count != 1 else ''}" if count else " before the first token"
