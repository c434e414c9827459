"""Reading server-sent events (the WHATWG format) from a stream of lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ClientEvent:
    """One event: its number, its type (state, stage, progress, warning) and its data."""

    id: int
    type: str
    data: dict[str, Any]


def read_events(lines: Iterable[bytes]) -> Iterator[ClientEvent]:
    """Events of a stream; comments and what was cut off at the end are left out.

    >>> list(read_events([b": hello\\n", b"id: 7\\n", b"event: state\\n", b'data: {"state": "queued"}\\n', b"\\n"]))
    [ClientEvent(id=7, type='state', data={'state': 'queued'})]
    """
    fields: dict[str, str] = {}
    for raw in lines:
        line = raw.decode("utf-8").rstrip("\r\n")
        if not line:
            if "data" in fields:
                data = json.loads(fields["data"])
                yield ClientEvent(int(fields.get("id", 0)), fields.get("event", "message"), data)
            fields = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            fields[name] = f"{fields['data']}\n{value}" if name == "data" and "data" in fields else value
