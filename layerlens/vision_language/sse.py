"""Server-sent events from a stream of bytes (WHATWG HTML, section 9.2.6): the ``data`` of every whole event."""

from __future__ import annotations

import re

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
