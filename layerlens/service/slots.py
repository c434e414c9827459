"""Answers of which there may only be so many at once: event streams, and files on their way in or out.

A place is taken where the answer begins and given back where it ends, in one block: between a look at the count and
the first byte of an answer others may come.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastapi.responses import FileResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

RETRY_S = 10


class Slots:
    """Places for answers.

    Args:
        most: how many there are.
        full: what is said when all are taken.
    """

    def __init__(self, most: int, full: str) -> None:
        self.most, self.full, self.taken = most, full, 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Hold a place.

        Raises:
            HTTPException: 503, all are taken.
        """
        if self.taken >= self.most:
            raise HTTPException(503, self.full, {"Retry-After": str(RETRY_S)})
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1


class CountedStream(StreamingResponse):
    """A stream that has a place as long as it is sent."""

    slots: Slots

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ``StreamingResponse``."""
        with self.slots.one():
            await super().__call__(scope, receive, send)


class CountedFile(FileResponse):
    """A file that has a place as long as it is sent."""

    slots: Slots

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ``FileResponse``."""
        with self.slots.one():
            await super().__call__(scope, receive, send)
