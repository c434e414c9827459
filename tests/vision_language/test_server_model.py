"""The client for OpenAI-compatible servers against small real servers that behave well, badly, or not at all."""

from __future__ import annotations

import json
import socket
import time
from contextlib import closing
from typing import Any

import pytest
from http_servers import TEXT, Script, answering, begin_stream, chunk, event, send, serving

from layerlens.exceptions import ConfigurationError
from layerlens.vision_language import GenerationError, ServerModel
from layerlens.vision_language import server_model as module

ASK = [{"role": "user", "content": "Report."}]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.01)


def ask(url: str, **settings: Any) -> Any:
    with closing(ServerModel(url, **{"model": "tiny", "timeout_s": 600, **settings})) as llm:
        return llm.generate(ASK, 32)


def test_answer_tokens_usage_and_steps():
    pause_s = 0.02
    with serving(answering(pause_s)) as url:
        start = time.perf_counter()
        made = ask(url)
        wall_ms = 1e3 * (time.perf_counter() - start)
    assert made.text == "".join(TEXT)
    assert (made.prompt_tokens, made.completion_tokens, made.finish_reason) == (7, 5, "stop")
    assert (made.attempts, made.streamed, made.token_unit) == (1, True, "token")
    assert len(made.token_ms) == len(TEXT) - 1
    # A pause lies between two tokens, and no token can be seen before it was sent: true of the sum whatever else runs.
    assert sum(made.token_ms) >= 1e3 * pause_s * (len(TEXT) - 1) * 0.9
    assert sum(made.steps_ms.values()) <= wall_ms
    assert made.steps_ms["llm_connect"] > 0
    assert made.communication.method == "bounds"
    assert made.communication.ms is None
    assert 0 < made.communication.lower_ms <= made.communication.upper_ms < wall_ms


@pytest.mark.parametrize(
    ("last", "headers", "server_ms"),
    [
        ({"timings": {"prompt_ms": 3.0, "predicted_ms": 7.0}}, {}, 10.0),
        ({"x_groq": {"usage": {"total_time": 0.008, "queue_time": 0.002, "completion_tokens": 5}}}, {}, 10.0),
        ({"total_duration": 10_000_000}, {}, 10.0),
    ],
    ids=["llama.cpp", "Groq", "Ollama"],
)
def test_communication_is_client_time_minus_the_servers_own(last: dict, headers: dict, server_ms: float):
    with serving(answering(0.01, last, **headers)) as url:
        made = ask(url)
    wall = sum(made.steps_ms.values()) - made.steps_ms["llm_prepare"]
    assert made.communication.method == "client time minus server time"
    assert made.communication.ms == pytest.approx(wall - server_ms, abs=1e-6)


def test_several_tokens_in_a_chunk_are_not_called_tokens():
    with serving(answering(last={"usage": {"prompt_tokens": 7, "completion_tokens": 50}})) as url:
        made = ask(url)
    assert (made.token_unit, made.completion_tokens) == ("chunk", 50)


def test_an_answer_in_one_piece_has_no_token_times():
    whole = {
        "choices": [{"message": {"content": "All of it."}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3},
    }
    with serving(lambda handler, _body: send(handler, 200, json.dumps(whole))) as url:
        made = ask(url)
    assert (made.text, made.streamed, made.token_ms, made.time_to_first_token_ms) == ("All of it.", False, (), None)


def test_rate_limits_and_server_errors_are_retried():
    busy = Script(
        lambda handler, _: send(handler, 429, '{"error": {"message": "slow down"}}', retry_after="0"),
        lambda handler, _: send(handler, 503, "down"),
        answering(),
    )
    with serving(busy) as url:
        made = ask(url)
    assert (made.attempts, made.text) == (3, "".join(TEXT))
    assert made.failures == ("the server answered 429: slow down", "the server answered 503: down")


def test_a_server_that_refuses_stream_options_is_asked_without_them():
    def strict(handler: Any, body: dict) -> None:
        if "stream_options" in body:
            send(handler, 422, '{"detail": "Unsupported fields: stream_options"}')
        else:
            answering()(handler, body)

    with serving(strict) as url:
        assert ask(url, retries=0).text == "".join(TEXT)


def _garbage_event(handler: Any, _body: dict) -> None:
    begin_stream(handler)
    event(handler, chunk("Nod"))
    event(handler, "{not json")


def _broken_off(handler: Any, _body: dict) -> None:
    begin_stream(handler)
    event(handler, chunk("Nodule "))
    event(handler, chunk("in "))


def _error_inside(handler: Any, _body: dict) -> None:
    begin_stream(handler)
    event(handler, {"error": {"message": "out of memory"}})


def _not_utf8(handler: Any, _body: dict) -> None:
    begin_stream(handler)
    handler.wfile.write(b"data: \xff\xfe\n\n")


def _endless_drip(handler: Any, _body: dict) -> None:
    begin_stream(handler)
    try:
        for _ in range(100):
            event(handler, chunk("x"))
            time.sleep(0.05)
    except OSError:
        pass  # the client has left


@pytest.mark.parametrize(
    ("step", "reason", "attempts", "partial"),
    [
        (lambda h, _: send(h, 200, "<html>hello</html>", "text/html"), "garbage: no stream of events", 1, ""),
        (lambda h, _: send(h, 200, "[1, 2]"), "garbage: not a JSON object: [1, 2]", 1, ""),
        (lambda h, _: send(h, 200, '{"choices": []}'), "garbage: the answer is not a chat completion", 1, ""),
        (_garbage_event, "garbage: not JSON: {not json after 1 token", 1, "Nod"),
        (_not_utf8, "garbage: bytes that are not UTF-8", 1, ""),
        (_error_inside, "an error: out of memory", 1, ""),
        (_broken_off, "the stream broke off after 2 tokens (3 attempts)", 3, "Nodule in "),
        (_endless_drip, "no complete answer within 1 s after", 3, "x"),
        (lambda h, _: time.sleep(600), "no answer within 1 s before the first token (3 attempts)", 3, ""),
        (lambda h, _: send(h, 401, '{"error": "no key"}'), "answered 401: no key; set api_key_env", 1, ""),
        (lambda h, _: send(h, 404, "nothing"), "answered 404: nothing; check base URL and llm_model", 1, ""),
        (lambda h, _: send(h, 429, "{}", retry_after="3600"), "it asks to wait 3600 s", 1, ""),
    ],
)  # fmt: skip
def test_bad_servers_fail_with_a_line_and_keep_what_arrived(step: Any, reason: str, attempts: int, partial: str):
    timeout_s = 1.0 if " within 1 s " in reason else 600.0  # a busy machine may take long to answer
    with serving(step) as url, pytest.raises(GenerationError) as caught:
        ask(url, retries=2, timeout_s=timeout_s)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.attempts == attempts
    assert caught.value.partial_text.startswith(partial)
    assert caught.value.steps_ms["llm_failed"] > 0


def test_nobody_there_is_tried_once_only_the_next_time():
    with socket.socket() as taken:  # bound, but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        tries = []
        with closing(ServerModel(f"http://127.0.0.1:{taken.getsockname()[1]}", model="tiny", retries=2)) as llm:
            for _ in range(2):
                with pytest.raises(GenerationError, match=r"no answer at http://127\.0\.0\.1") as caught:
                    llm.generate(ASK, 8)
                tries.append(caught.value.attempts)
    assert tries == [3, 1]


def test_the_key_is_sent_and_recorded_nowhere(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SERVER_KEY", "s3cret")
    script = Script(answering())
    with serving(script) as url:
        named = url.replace("http://", "http://user:pass@")
        with closing(ServerModel(named, api_key_env="SERVER_KEY")) as llm:
            made = llm.generate(ASK, 32)
    assert script.headers[0]["authorization"] == "Bearer s3cret"
    shown = repr((made, llm.describe()))
    assert "s3cret" not in shown
    assert "pass" not in shown
    assert llm.describe()["name"] == "tiny"  # asked from the server


@pytest.mark.parametrize(
    ("models", "message"), [((), "lists no model"), (("a", "b"), "offers a, b; name one with llm_model")]
)
def test_the_model_must_be_named_where_the_server_does_not_say(models: tuple[str, ...], message: str):
    with serving(answering(), models) as url, pytest.raises(GenerationError, match=message):
        ask(url, model=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "localhost:8000"}, "is not the URL of a server"),
        ({"base_url": "http://x", "api_key_env": "NO_SUCH_KEY"}, "the environment variable NO_SUCH_KEY is not set"),
    ],
)
def test_settings_that_cannot_work(settings: dict, message: str):
    with pytest.raises(ConfigurationError, match=message):
        ServerModel(**settings)
