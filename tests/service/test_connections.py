"""Connections that hold a place without a request: half-sent headers, slow bodies, answers that nobody reads."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from serving import BEARER, TOKEN, Serving, ask

from layerlens.exceptions import ConfigurationError
from layerlens.service import connections as module
from layerlens.service.connections import Connections, Counted, Full, Listener, Room, protocol_of, room_for
from layerlens.service.settings import ServiceSettings

HALF = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: "


@contextlib.contextmanager
def opened(port: int, count: int, sent: bytes) -> Iterator[list[socket.socket]]:
    """Connections that send this and no more."""
    held = []
    try:
        for _ in range(count):
            one = socket.create_connection(("127.0.0.1", port), timeout=300)
            held.append(one)
            with contextlib.suppress(OSError):  # refused already
                one.sendall(sent)
        yield held
    finally:
        for one in held:
            one.close()


@pytest.fixture(scope="module")
def narrow(new_server: Callable[..., Serving]) -> Serving:
    """A server with 256 descriptors."""
    return new_server("--rate", "1000", "--burst", "1000", descriptors=256)


POST = b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\n%sContent-Length: 60000\r\n\r\n{"
TOLD = f"Authorization: Bearer {TOKEN}\r\n".encode()


@pytest.mark.parametrize("sent", [HALF, b"", POST % b"", POST % TOLD])
def test_a_server_with_few_descriptors_answers_while_hundreds_of_requests_are_half_sent(narrow: Serving, sent: bytes):
    assert narrow.process is not None
    with opened(narrow.port, 600, sent) as held:
        for _ in range(5):  # how soon, benchmarks/service_attacks.py says
            for _ in range(20):
                with contextlib.suppress(OSError, http.client.HTTPException):
                    status, _ = ask(narrow, "GET", "/healthz", headers={})
                    listed, _ = ask(narrow, "GET", "/v1/jobs", headers=BEARER)
                    if (status, listed) == (200, 200):
                        break
                assert sent in (b"", POST % TOLD)  # those that have just come may be about to send the rest
                time.sleep(0.05)
            assert (status, listed) == (200, 200)
            assert psutil.Process(narrow.process.pid).num_fds() < 256
            for one in held[:100]:  # the attack goes on
                with contextlib.suppress(OSError):
                    one.sendall(b"a")
    assert "Traceback" not in narrow.log
    assert "Too many open files" not in narrow.log


def test_too_few_descriptors_are_said_before_anything_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (150, 150))
    with pytest.raises(ConfigurationError, match=r"150 open files, and a server with --max-running 4 needs \d+; raise"):
        room_for(ServiceSettings(tmp_path, (tmp_path,), max_running=4))


@pytest.mark.parametrize(
    ("soft", "hard", "raised_to"), [(1024, 4096, 4096), (1024, 1024, None), (1024, resource.RLIM_INFINITY, 65536)]
)
def test_the_descriptor_limit_is_raised_and_never_passed(
    soft: int, hard: int, raised_to: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    raised = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    room = room_for(ServiceSettings(tmp_path, (tmp_path,)))
    assert raised == ([] if raised_to is None else [(raised_to, hard)])
    assert room.connections + room.files + 96 < (raised_to or soft)
    assert room.per_address < room.connections == min(2000, room.connections)
    own = ServiceSettings(tmp_path, (tmp_path,), max_connections=50, max_connections_per_address=10)
    assert (room_for(own).connections, room_for(own).per_address) == (50, 10)


# --- the protocol with short times, in this process ---


class Served:
    """A server of one page in the loop of the test."""

    def __init__(self, room: Room) -> None:
        self.connections = Connections(room)
        self.port = 0
        self.bodies: list[int] = []

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/large":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(200):
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
            return
        size, more = 0, scope["path"] == "/read"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.bodies.append(-1)
                return
            size, more = size + len(message["body"]), message["more_body"]
        self.bodies.append(size)
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})

    async def __aenter__(self) -> Served:
        import uvicorn

        listening = socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        config = uvicorn.Config(
            self.app, http=protocol_of(self.connections), lifespan="off", ws="none", log_config=None, interface="asgi3",
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        self.server = uvicorn.Server(config)
        self.server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
        listener = Listener.of(listening, self.connections, plain=True)
        self.task = asyncio.create_task(self.server.serve(sockets=[listener]))
        self.sweeper = asyncio.create_task(self.connections.work())
        while not self.server.started:
            await asyncio.sleep(0.01)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.sweeper.cancel()
        self.server.should_exit = True
        await self.task

    async def talk(self, *parts: bytes, pause_s: float = 0.0) -> bytes:
        """Send parts, and read until the server closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        answer = bytearray()

        async def listen() -> None:
            with contextlib.suppress(ConnectionError):
                while piece := await reader.read(1_000_000):
                    answer.extend(piece)

        listening = asyncio.create_task(listen())
        with contextlib.suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause_s)
        await listening
        writer.close()
        return bytes(answer)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("HEADER_S", 0.6), ("IDLE_S", 0.4), ("BODY_S", 0.6), ("WRITE_S", 0.6), ("SWEEP_S", 0.05)):
        monkeypatch.setattr(module, name, seconds)


def run(*talks: Any, room: Room = Room(100, 100, 10)) -> tuple[list[bytes], Served]:  # noqa: B008 (frozen)
    """Answers to conversations with one server, all at once."""

    async def all_of_them() -> tuple[list[bytes], Served]:
        async with Served(room) as served:
            answers = await asyncio.wait_for(asyncio.gather(*(talk(served) for talk in talks)), 30)
            for _ in range(100):
                if not served.connections.open:
                    break
                await asyncio.sleep(0.05)
            assert not served.connections.open
            assert not served.connections.of_address
            return answers, served

    return asyncio.run(all_of_them())


def test_what_is_half_sent_is_ended_with_a_reason(short: None):
    whole = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    slow_header = [b"GET / HTTP/1.1\r\n", *[b"X-%d: y\r\n" % number for number in range(60)]]
    post = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 4000\r\n\r\n"
    (silent, header, second, body, unread, kept), served = run(
        lambda served: served.talk(),
        lambda served: served.talk(*slow_header, pause_s=0.05),
        lambda served: served.talk(whole, *slow_header, pause_s=0.05),
        lambda served: served.talk(post % b"/read", *[b"y"] * 40, pause_s=0.05),
        lambda served: served.talk(post % b"/", *[b"y"] * 40, pause_s=0.05),
        lambda served: served.talk(whole),
    )
    assert silent == b""
    assert header.startswith(b"HTTP/1.1 408 ")
    assert second.startswith(b"HTTP/1.1 200 ")
    assert b"HTTP/1.1 408 " in second
    assert body.startswith(b"HTTP/1.1 408 ")
    assert unread.startswith(b"HTTP/1.1 200 ")
    assert b"408" not in unread
    assert kept.endswith(b"ok")
    assert -1 in served.bodies  # the application was told that the client is gone
    assert served.connections.timed_out >= 4
    for answer in (header, body):
        head, _, content = answer.partition(b"\r\n\r\n")
        assert b"content-length: %d\r\n" % len(content) in head + b"\r\n"
        json.loads(content)


def test_a_body_that_comes_steadily_has_its_time(short: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BODY_BYTES_PER_S", 100.0)
    head = b"POST /read HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2000\r\n\r\n"
    (answer,), served = run(lambda served: served.talk(head, *[b"y" * 100] * 20, pause_s=0.08))
    assert answer.endswith(b"ok")
    assert served.bodies == [2000]


def test_an_answer_that_nobody_reads_is_given_up(short: None):
    async def take_nothing(served: Served) -> bytes:
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.connect(("127.0.0.1", served.port))
            one.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
            for _ in range(100):
                await asyncio.sleep(0.05)
                if served.connections.timed_out:
                    return b""
        return b"held"

    (answer,), served = run(take_nothing)
    assert answer == b""
    assert served.connections.timed_out == 1


def test_one_address_has_its_share_and_waiting_connections_make_way():
    async def fill(served: Served) -> bytes:
        held = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(6)]
        refused = [await reader.read(1000) for reader, _ in held[4:]]
        assert all(one.startswith(b"HTTP/1.1 503 ") for one in refused)
        head, _, content = refused[0].partition(b"\r\n\r\n")
        assert b"content-length: %d\r\n" % len(content) in head
        json.loads(content)
        held[2][1].write(b"GET /")  # half a header counts less than none
        await asyncio.sleep(0.1)
        answers = []
        for gone in (2, 0):
            answers.append(await served.talk(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))
            assert await held[gone][0].read() == b""
            await asyncio.sleep(0.1)
            held.append(await asyncio.open_connection("127.0.0.1", served.port))
        for _, writer in held:
            writer.close()
        return b"".join(answers)

    (answers,), served = run(fill, room=Room(8, 4, 1))
    assert answers.count(b"\r\n\r\nok") == 2
    assert served.connections.refused == 2


def pair(
    registry: Connections, address: str, *, age_s: float = 0.0, busy: bool = False
) -> tuple[Counted, socket.socket]:
    here, there = socket.socketpair()
    counted = Counted(fileno=here.detach())
    assert registry.admit(counted, address)
    counted.since -= age_s
    counted.busy = busy
    return counted, there


def test_who_makes_way_when_all_places_are_taken():
    registry = Connections(Room(3, 3, 1))
    held = [pair(registry, "10.0.0.1", age_s=5.0, busy=True), pair(registry, "10.0.0.2", age_s=2.0)]
    held.append(pair(registry, "10.0.0.3", age_s=3.0))
    with pytest.raises(BlockingIOError):
        registry.make_room()
    assert held[1][1].gettimeout() is None
    gone = [there for counted, there in held if counted in registry.leaving]
    assert gone == [held[1][1]] or gone == [held[2][1]]
    assert gone[0].recv(1) == b""
    with pytest.raises(Full):  # it has not been closed yet
        registry.make_room()
    next(counted for counted, there in held if there is gone[0]).close()
    registry.make_room()
    held.append(pair(registry, "10.0.0.4"))
    for counted, _ in held:
        counted.busy = True
    with pytest.raises(Full):
        registry.make_room()
    for counted, there in held:
        counted.close()
        there.close()
    assert not registry.open
    assert not registry.of_address


def test_whoever_has_filled_its_share_may_still_ask_whether_the_server_lives():
    """Its share is at work, so that nothing can make way: what else it asks is refused, and guests are few."""

    async def fill(served: Served) -> bytes:
        held = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(4)]
        for _, writer in held:
            writer.write(b"POST /read HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
        while sum(one.busy for one in served.connections.open.values()) < 4:
            await asyncio.sleep(0.01)
        health, other = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /heal HTTP/1.1\r\nHost: x\r\n\r\n"
        assert (await served.talk(health)).endswith(b"\r\n\r\nok")  # and is closed: one request a guest
        assert (await served.talk(health[:6], health[6:], pause_s=0.02)).endswith(b"\r\n\r\nok")
        assert (await served.talk(other)).startswith(b"HTTP/1.1 503 ")
        silent = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(2)]
        await asyncio.sleep(module.YOUNG_S + 0.05)
        assert (await served.talk(health)).endswith(b"\r\n\r\nok")  # the first of the silent ones made way
        assert [await reader.read() for reader, _ in silent][1].startswith(b"HTTP/1.1 503 ")
        for _, writer in held + silent:
            writer.close()
        return b""

    _, served = run(fill, room=Room(8, 4, 1))
    assert served.connections.refused == 2
    assert not served.connections.guests


def test_bytes_that_this_process_has_not_read_keep_a_place():
    registry = Connections(Room(2, 2, 1))
    behind, silent = pair(registry, "10.0.0.1", age_s=5.0), pair(registry, "10.0.0.2", age_s=1.0)
    behind[1].sendall(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(BlockingIOError):
        registry.make_room()
    assert registry.leaving == {silent[0]}
    for counted, there in (behind, silent):
        counted.close()
        there.close()


def test_addresses_of_one_network_are_one():
    assert (
        module._counted_as("2001:db8::1") == module._counted_as("2001:db8::ffff") != module._counted_as("2001:db9::1")
    )
    assert module._counted_as("::ffff:10.0.0.1") == module._counted_as("10.0.0.1") == "10.0.0.1"
    assert module._counted_as("fe80::1%eth0") == "fe80::/64"


def test_a_tls_handshake_has_its_time_and_counts(new_server: Callable[..., Serving], tmp_path: Path):
    """Connections that never begin it are no requests yet, and hold descriptors all the same."""
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    os.system(
        f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate} -days 2 -subj /CN=localhost "
        "-addext subjectAltName=IP:127.0.0.1 2>/dev/null"
    )
    served = new_server("--tls-certificate", str(certificate), "--tls-key", str(key), descriptors=256)
    import ssl

    context = ssl.create_default_context(cafile=str(certificate))
    with opened(served.port, 300, b""):
        for _ in range(100):  # those that have just come are about to begin
            connection = http.client.HTTPSConnection("127.0.0.1", served.port, timeout=300, context=context)
            with contextlib.suppress(OSError):
                connection.request("GET", "/healthz")
                assert connection.getresponse().status == 200
                break
            time.sleep(0.05)
        else:
            pytest.fail("no answer")
        connection.close()
    assert "Traceback" not in served.log
