"""A TCP proxy in front of a server that can be cut in the middle of an upload: the store goes down, its data stay."""

from __future__ import annotations

import contextlib
import socket
import threading


class FlakyProxy:
    """Forwards to ``port`` until ``budget`` bytes have gone to the server; then every connection is reset."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.budget: int | None = None
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            if self._down():
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self.target))
            for source, sink, counted in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._forward, args=(source, sink, counted), daemon=True).start()

    def _down(self) -> bool:
        return self.budget is not None and self.budget <= 0

    def _forward(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                if counted and self.budget is not None:
                    self.budget -= len(data)
                if self._down():
                    break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # the thread of the other direction wakes up and closes its own end
        source.close()
