"""Starting a server: the store, the application, uvicorn."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

from layerlens.exceptions import ConfigurationError
from layerlens.service.settings import ServiceSettings

GRACE_S = 5


def serve(
    settings: ServiceSettings,
    *,
    tls_certificate: Path | None = None,
    tls_key: Path | None = None,
    ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve until SIGINT or SIGTERM; jobs that run then wait for the next server.

    Args:
        settings: what the operator decided.
        tls_certificate, tls_key: PEM files, for HTTPS.
        ready: called with the address once the server accepts connections.

    Raises:
        ConfigurationError: the settings are not safe, the address is taken, or packages are missing.
    """
    settings.check()
    try:
        import uvicorn

        from layerlens.service.app import create_app
        from layerlens.service.connections import IDLE_S, Connections, Listener, protocol_of, room_for, watched
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"{error.name} is not installed; run: pip install 'layerlens[serve]'") from error
    from layerlens.service.scheduler import open_state

    room = room_for(settings)
    settings = dataclasses.replace(settings, max_streams=min(settings.max_streams, room.connections // 2))
    store, lock = open_state(settings)
    try:
        connections = Connections(room)
        listener = Listener.of(_listen(settings), connections, plain=tls_certificate is None)
        app = create_app(settings, store, files_at_once=room.files)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            http=protocol_of(connections),
            loop="asyncio",  # which accepts by the listener's own method
            ws="none",
            timeout_keep_alive=int(IDLE_S),
            timeout_graceful_shutdown=GRACE_S,
            h11_max_incomplete_event_size=64 * 1024,
            ssl_certfile=None if tls_certificate is None else str(tls_certificate),
            ssl_keyfile=None if tls_key is None else str(tls_key),
        )
        scheme = "https" if tls_certificate is not None else "http"
        host, port = listener.getsockname()[:2]
        ready(f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}")
        # Connections that come before the loop runs wait in the listener's queue.
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        asyncio.run(watched(uvicorn.Server(config).serve(sockets=[listener]), connections))
    finally:
        os.close(lock)


def _listen(settings: ServiceSettings) -> socket.socket:
    """The socket, bound here so that a port that is taken is one clear line, and port 0 is known."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=1024)
    except OSError as error:
        raise ConfigurationError(
            f"--host, --port: cannot listen on {settings.host}:{settings.port}: {error.strerror}; is another server "
            "running?"
        ) from error
