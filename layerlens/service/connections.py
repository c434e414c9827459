"""How many connections a server holds, and for how long one may hold a place without a request.

uvicorn has a time-out for idle connections after an answer, and none for a request that comes byte by byte: whoever
sends half a header on many connections takes all descriptors. Here

- the listener counts what it accepts, TLS handshakes included, so that the sum stays below the descriptor limit;
- where there is no room, connections that wait for a request make way, oldest first; where all are at work, new ones
  wait in the kernel's queue;
- every connection has a deadline for what is due next: a header, a body at a least rate, an answer that is read;
- whoever has filled the share of its address with requests at work may still ask for /healthz, as a guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import itertools
import os
import resource
import socket
import time
from collections import Counter
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import anyio.to_thread
from uvicorn.protocols.http.h11_impl import H11Protocol

from layerlens.exceptions import ConfigurationError
from layerlens.service.settings import ServiceSettings

HEADER_S = 10.0
"""For a TLS handshake and a whole header."""
IDLE_S = 5.0
"""Between an answer and the next request."""
BODY_S, BODY_BYTES_PER_S = 20.0, 500.0
"""A body has 20 s, and one more for every 500 bytes that came (as Apache's mod_reqtimeout)."""
WRITE_S = 60.0
"""For some 48 KiB of an answer (asyncio's water marks) to be taken."""
CLOSE_S = 5.0
"""For the last bytes of a connection that is closed."""
SWEEP_S = 0.25
YOUNG_S = 0.05
"""A connection that has sent nothing yet, and came just now, makes way for nobody: its request is about to be read."""

GUESTS = 64
"""Connections beyond the share of their address that may be open: each may ask for /healthz, and for nothing else."""
GUEST_S = 1.0
"""For a guest's request."""
GUEST_REQUEST = b"GET /healthz"

SLOW_S, SLOW_BYTES_PER_S = 0.25, 8192.0
"""A body that has come more slowly than this makes way where there is no room."""
HALF_SENT, ANSWERED, NOTHING_YET = range(3)
BATCH = 8
"""Connections that are accepted before those that came before are read; asyncio itself would take all that wait."""

MOST_DESCRIPTORS = 65536
THREADS = 16
"""Of each of the two pools that requests use; each may have a database open."""
DATABASE_DESCRIPTORS, JOB_DESCRIPTORS, SPARE_DESCRIPTORS = 3, 8, 24
FEWEST_CONNECTIONS = 16
TIMED_OUT = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\ncontent-length: 45\r\nconnection: close\r\n\r\n"
    b'{"detail":"the request did not come in time"}'
)
NO_ROOM = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: 58\r\nretry-after: 10\r\n"
    b'connection: close\r\n\r\n{"detail":"your address has too many connections already"}'
)


@dataclass(frozen=True)
class Room:
    """What the descriptors of this process are enough for.

    Args:
        connections: connections at once.
        per_address: of them from one address (of IPv6: one /64 network).
        files: uploads and downloads at once.
    """

    connections: int
    per_address: int
    files: int

    @property
    def guests(self) -> int:
        """Connections beyond their address's share; the other half of what is left stays with other addresses."""
        return min(GUESTS, (self.connections - self.per_address) // 2)


def room_for(settings: ServiceSettings) -> Room:
    """Raise the descriptor limit as far as the system lets, and share out what there is.

    Raises:
        ConfigurationError: the limit is too low to serve with.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    limit = MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    own = len(os.listdir("/dev/fd")) + SPARE_DESCRIPTORS + JOB_DESCRIPTORS * settings.max_running
    own += 2 * THREADS * DATABASE_DESCRIPTORS
    free = limit - own
    files = min(64, free // 4)
    connections = min(settings.max_connections, free - files)
    if connections < FEWEST_CONNECTIONS and connections < settings.max_connections:
        raise ConfigurationError(
            f"the system lets this process have {limit} open files, and a server with --max-running "
            f"{settings.max_running} needs {own + FEWEST_CONNECTIONS * 4 // 3 + 1}; raise the limit (ulimit -n, "
            "LimitNOFILE of systemd)"
        )
    per_address = settings.max_connections_per_address or max(1, connections * 3 // 4)
    return Room(connections, min(per_address, connections), files)


class Full(OSError):
    """There is no room: asyncio leaves the listener alone for a second, as where descriptors have run out."""

    def __init__(self) -> None:
        super().__init__(errno.EMFILE, "all connections are at work")


class Counted(socket.socket):
    """An accepted connection, which is counted until its descriptor is closed."""

    registry: Connections | None = None
    address = ""
    since = 0.0
    """When it came, or began to wait for a request."""
    busy = False
    """Has a request whose answer is not complete."""
    deadline: float | None = None
    guest = False
    """Is beyond the share of its address."""
    protocol: TimedProtocol | None = None

    def waits(self, now: float) -> bool:
        """Whether it is the client who is awaited: for a request, or for a body that hardly comes."""
        if not self.busy or self.protocol is None or self.protocol.body_since is None:
            return not self.busy
        seconds = now - self.protocol.body_since
        return seconds > SLOW_S and self.protocol.came < SLOW_BYTES_PER_S * seconds

    @property
    def unread(self) -> bool:
        """Whether bytes came that this process has not read yet: then it is behind, and not the client."""
        try:
            return bool(self.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:  # there are none, or it is closed
            return False

    @property
    def rank(self) -> int:
        """Who makes way first, of those that wait."""
        if self.protocol is None:
            return NOTHING_YET
        if self.protocol.half or self.protocol.body_since is not None:
            return HALF_SENT
        return NOTHING_YET if self.protocol.cycle is None else ANSWERED

    def close(self) -> None:
        if self.registry is not None:
            self.registry.forget(self)
        super().close()

    def drop(self) -> None:
        """Close it at once, or, while its TLS handshake is under way, as if the other side had."""
        if self.protocol is not None:
            self.protocol.transport.abort()
            return
        with contextlib.suppress(OSError):  # it has gone already
            self.shutdown(socket.SHUT_RDWR)


class Connections:
    """All connections of one server.

    Args:
        room: how many there may be.
    """

    def __init__(self, room: Room) -> None:
        self.room = room
        self.open: dict[int, Counted] = {}
        self.leaving: set[Counted] = set()
        self.of_address: Counter[str] = Counter()
        self.guests: dict[Counted, None] = {}
        self.made_way = self.refused = self.timed_out = 0

    def make_room(self) -> None:
        """Before a connection is accepted.

        Raises:
            BlockingIOError: some are closed for it, in the next turn of the loop.
            Full: as many as there may be are open, and all are at work or have just come.
        """
        if len(self.open) < self.room.connections:
            return
        busiest = self.of_address.most_common(1)
        if not self.leaving and busiest and (self._drop_waiting(busiest[0][0]) or self._drop_waiting(None)):
            raise BlockingIOError
        raise Full

    def admit(self, connection: Counted, address: str) -> bool:
        """Whether a connection that was accepted may stay, as a guest where its address has its share."""
        counted_as = _counted_as(address)
        guest = self.of_address[counted_as] >= self.room.per_address and not self._drop_waiting(counted_as)
        if guest and not self._place_for_a_guest():
            self.refused += 1
            return False
        connection.registry, connection.address, connection.guest = self, counted_as, guest
        connection.since = time.monotonic()
        connection.deadline = connection.since + (GUEST_S if guest else HEADER_S)
        self.open[connection.fileno()] = connection
        if guest:
            self.guests[connection] = None
        else:
            self.of_address[counted_as] += 1
        return True

    def _place_for_a_guest(self) -> bool:
        """There is one, or the guest that has waited longest makes way."""
        if len(self.guests) < self.room.guests:
            return True
        now = time.monotonic()
        waiting = (one for one in self.guests if one.waits(now) and now - one.since > YOUNG_S and not one.unread)
        chosen = next(waiting, None)
        if chosen is not None:
            self._leave(chosen)
        return chosen is not None

    def forget(self, connection: Counted) -> None:
        """Its descriptor is about to be closed."""
        if self.open.pop(connection.fileno(), None) is not None:
            self._uncount(connection)
            self.leaving.discard(connection)

    def _uncount(self, connection: Counted) -> None:
        if connection.guest:
            self.guests.pop(connection, None)
        elif connection not in self.leaving:
            self.of_address[connection.address] -= 1
            if not self.of_address[connection.address]:
                del self.of_address[connection.address]

    def _drop_waiting(self, address: str | None) -> bool:
        """Close some that wait for a request, half-sent ones first, then those that have waited longest.

        A guest counts for nobody's share.
        """
        now = time.monotonic()

        waiting = [
            one
            for one in self.open.values()
            if address is None or (address == one.address and not one.guest)
            if one.waits(now) and one not in self.leaving
            if one.rank < NOTHING_YET or now - one.since > YOUNG_S
        ]
        waiting.sort(key=lambda one: (one.rank, one.since))
        silent = (one for one in waiting if one.rank == HALF_SENT or not one.unread)
        chosen = list(itertools.islice(silent, max(1, self.room.connections // 20)))
        for one in chosen:
            self._leave(one)
        return bool(chosen)

    def _leave(self, connection: Counted) -> None:
        """Close one that makes way."""
        self._uncount(connection)
        self.leaving.add(connection)
        connection.drop()
        self.made_way += 1

    async def work(self) -> None:
        """End what is over its deadline, until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            self.sweep(time.monotonic())

    def sweep(self, now: float) -> None:
        """Look at all deadlines once."""
        for one in list(self.open.values()):
            if one.deadline is not None and now >= one.deadline:
                self.timed_out += 1
                one.deadline = now + CLOSE_S
                if one.protocol is None:
                    one.drop()
                else:
                    one.protocol.time_out(now)


def _counted_as(address: str) -> str:
    """An IPv4 address, or the network of an IPv6 one: who has one of its addresses has all of them."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    return str(found.ipv4_mapped or ipaddress.ip_network((found, 64), strict=False))


class Listener(socket.socket):
    """A listening socket that accepts while there is room."""

    connections: Connections
    plain = True
    turn = 0
    """How many of a batch were accepted."""

    @classmethod
    def of(cls, listening: socket.socket, connections: Connections, *, plain: bool) -> Listener:
        """Take a listening socket over; ``plain``: without TLS, so that a refusal can be said."""
        one = cls(fileno=listening.detach())
        one.connections, one.plain = connections, plain
        return one

    def accept(self) -> tuple[socket.socket, Any]:
        """See ``socket.socket.accept``.

        Raises:
            BlockingIOError: there are no more for now.
            Full: there is no room.
        """
        if self.turn == BATCH:
            self.turn = 0
            raise BlockingIOError
        while self.turn < BATCH:
            self.turn += 1
            self.connections.make_room()
            accepted, address = super().accept()
            counted = Counted(fileno=accepted.detach())
            if self.connections.admit(counted, str(address[0])):
                return counted, address
            with counted:
                if self.plain:
                    counted.setblocking(False)
                    with contextlib.suppress(OSError):
                        counted.send(NO_ROOM)
        self.turn = 0
        raise BlockingIOError


class TimedProtocol(H11Protocol):
    """uvicorn's protocol, which tells the registry what its connection waits for, and until when."""

    registry: Connections
    place: Counted | None = None
    half = False
    """Some of a request has come, and not all of its header."""
    came = 0
    """Bytes since ``body_since``."""
    body_since: float | None = None
    """Since when a body is incomplete."""
    writing = False
    """Bytes of an answer wait to be taken."""
    asked = b""
    """What a guest has sent, as long as it may become what it may ask."""

    def connection_made(self, transport: Any) -> None:
        """See ``asyncio.Protocol``, as for those below."""
        super().connection_made(transport)
        self.place = self.registry.open.get(transport.get_extra_info("socket").fileno())
        if self.place is not None:
            self.place.protocol = self

    def data_received(self, data: bytes) -> None:
        if self.place is not None and self.place.guest and not self.asked.startswith(GUEST_REQUEST):
            self.asked += data
            if not self.asked.startswith(GUEST_REQUEST):
                if not GUEST_REQUEST.startswith(self.asked):
                    self._send_away()
                return
            data = self.asked
        self.came += len(data)
        super().data_received(data)
        self._look()

    def _send_away(self) -> None:
        self.registry.refused += 1
        self.transport.write(NO_ROOM)
        self.transport.close()

    def on_response_complete(self) -> None:
        if self.place is not None and self.place.guest:
            self.transport.close()
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._look()

    def _look(self) -> None:
        """Set the deadline for what is due next."""
        place = self.place
        if place is None or self.transport.is_closing():
            return
        now = time.monotonic()
        at_work = self.cycle is not None and not self.cycle.response_complete
        if at_work != place.busy:
            place.busy, place.since = at_work, now
        half = not at_work and bool(self.conn.trailing_data[0])
        if self.cycle is None or not self.cycle.more_body:
            self.body_since = None
        elif self.body_since is None:
            self.body_since, self.came = now, 0
        if self.flow.write_paused:
            place.deadline = place.deadline if self.writing else now + WRITE_S
        elif self.body_since is not None:  # one that was answered before it was whole gets no more time for more bytes
            place.deadline = self.body_since + BODY_S + (self.came / BODY_BYTES_PER_S if at_work else 0.0)
        elif at_work:
            place.deadline = None
        elif self.cycle is not None and not (half and self.half):  # the first request has its time from the beginning
            place.deadline = now + (HEADER_S if half else IDLE_S)
        self.half, self.writing = half, self.flow.write_paused

    def time_out(self, now: float) -> None:
        """End the connection; with a reason, where the other side may wait for one."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if self.transport.is_closing():
            self.transport.abort()
        elif self.place is not None and answering and self.flow.read_paused and not self.flow.write_paused:
            self.place.deadline = now + BODY_S  # it is the server that is behind
        elif answering and self.cycle.response_started:
            self.transport.abort()
        elif self.place is not None and self.place.guest and not self.asked.startswith(GUEST_REQUEST):
            self._send_away()
        else:
            if answering or self.half:
                self.transport.write(TIMED_OUT)
            self.transport.close()


def protocol_of(connections: Connections) -> type[TimedProtocol]:
    """The protocol of one server, as a class, which uvicorn wants."""
    return type("TimedProtocol", (TimedProtocol,), {"registry": connections})


async def watched(serving: Coroutine[Any, Any, None], connections: Connections) -> None:
    """Serve with deadlines, and no more threads than there are descriptors for."""
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(THREADS, thread_name_prefix="layerlens"))
    anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
    usual = loop.get_exception_handler() or (lambda loop, context: loop.default_exception_handler(context))
    loop.set_exception_handler(
        lambda loop, context: None if isinstance(context.get("exception"), Full) else usual(loop, context)
    )
    sweeper = asyncio.create_task(connections.work())
    try:
        await serving
    finally:
        sweeper.cancel()
