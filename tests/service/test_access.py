"""Who may use a server: tokens, addresses, rates."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from serving import OTHER_TOKEN, TOKEN, Serving, ask
from typer.testing import CliRunner

from layerlens.cli.main import app
from layerlens.exceptions import ConfigurationError
from layerlens.service.client import Client
from layerlens.service.guard import Buckets, Guard
from layerlens.service.settings import ServiceSettings, Tokens, is_loopback, load_tokens


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", f"Bearer {OTHER_TOKEN}", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", TOKEN,
     f"Basic {TOKEN}", f"Bearer {TOKEN.upper()}", "Bearer \xff\xfe"],
)  # fmt: skip
def test_without_the_right_token_no_route_answers(server: Serving, authorization: str | None):
    headers = {} if authorization is None else {"Authorization": authorization}
    _, document = ask(server, "GET", "/openapi.json", headers={})
    secured = [
        (verb.upper(), path.replace("{job_id}", "0" * 32).replace("{path}", "manifest.json"))
        for path, operations in json.loads(document)["paths"].items()
        for verb, operation in operations.items()
        if "security" in operation
    ]
    assert len(secured) == 10
    for verb, path in secured:
        status, text = ask(server, verb, path, headers=headers)
        assert status == 401, (verb, path)
        assert TOKEN not in text
    for path in ("/healthz", "/readyz", "/docs"):
        assert ask(server, "GET", path, headers={})[0] == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.invalid", ""])
def test_a_public_address_needs_a_token(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LAYERLENS_SERVE_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["serve", "--host", host, "--port", "0"])
    assert done.exit_code == 2
    assert "no token is set" in done.output
    assert not is_loopback(host)


def test_tokens_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LAYERLENS_SERVE_TOKEN", raising=False)
    path = tmp_path / "tokens"
    path.write_text(f"# two\n{TOKEN}\n\n{OTHER_TOKEN}\n")
    path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        load_tokens(path)
    path.chmod(0o600)
    tokens = load_tokens(path)
    assert {tokens.holder(f"bearer {token}") is not None for token in (TOKEN, OTHER_TOKEN)} == {True}
    assert tokens.holder(f"Bearer {TOKEN}") != tokens.holder(f"Bearer {OTHER_TOKEN}")
    assert TOKEN not in repr(tokens) + repr(vars(tokens))
    path.write_text("short")
    with pytest.raises(ConfigurationError, match="16 or more") as caught:
        load_tokens(path)
    assert "'short'" not in str(caught.value)
    path.write_text("# none\n")
    with pytest.raises(ConfigurationError, match="has no token"):
        load_tokens(path)


def test_a_client_sends_no_token_over_the_network_in_the_clear():
    with pytest.raises(ConfigurationError, match="unencrypted"):
        Client("http://layerlens.example:8642", TOKEN)
    Client("https://layerlens.example", TOKEN)
    with pytest.raises(ConfigurationError, match="not an address") as caught:
        Client(f"http://user:{TOKEN}@127.0.0.1:8642")
    assert TOKEN not in str(caught.value)


def guarded(settings: ServiceSettings, requests: list[dict[str, str]], path: str = "/v1/jobs") -> list[int]:
    """Statuses that the guard gives to requests with these headers."""
    statuses: list[int] = []

    async def behind(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def all_of_them() -> None:
        guard = Guard(behind, settings)
        for headers in requests:
            encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
            scope = {"type": "http", "path": path, "headers": encoded, "client": ("127.0.0.1", 5)}
            await guard(scope, None, send)  # type: ignore[arg-type]

    asyncio.run(all_of_them())
    return statuses


def test_without_tokens_only_local_names_are_answered(tmp_path: Path):
    """A page in a browser that resolves its own name to 127.0.0.1 (DNS rebinding) gets nothing."""
    hosts = [
        "evil.example",
        "evil.example:8642",
        "localhost.evil.example",
        "",
        "localhost:8642",
        "127.0.0.1:1",
        "[::1]:9",
    ]
    found = guarded(ServiceSettings(tmp_path, (tmp_path,)), [{"host": host} for host in hosts])
    assert found == [403] * 4 + [200] * 3


def test_each_token_has_its_own_rate(tmp_path: Path):
    limited = ServiceSettings(tmp_path, (tmp_path,), tokens=Tokens([TOKEN, OTHER_TOKEN]), rate_per_s=0.001, burst=2)
    first, other = {"authorization": f"Bearer {TOKEN}"}, {"authorization": f"Bearer {OTHER_TOKEN}"}
    assert guarded(limited, [first, first, first, other]) == [200, 200, 429, 200]
    guesses = [{"authorization": f"Bearer guess-{number}"} for number in range(4)]
    assert guarded(limited, [*guesses, first]) == [401, 401, 429, 429, 200]


def test_rates_recover_and_do_not_follow_the_wall_clock(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr("layerlens.service.guard.time.monotonic", lambda: now)
    monkeypatch.setattr("layerlens.service.guard.time.time", lambda: pytest.fail("a wall clock was asked"))
    buckets = Buckets(rate=2.0, burst=1)
    assert buckets.take("a") == 0.0
    assert buckets.take("a") == pytest.approx(0.5)
    now += 0.5
    assert buckets.take("a") == 0.0
