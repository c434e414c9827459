"""A job's events as server-sent events; a client that was cut off continues after the last one it has seen."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
from collections.abc import AsyncIterator

from layerlens.service.slots import Slots
from layerlens.service.store import FINAL, Event, JobStore

logger = logging.getLogger(__name__)

POLL_S, HEARTBEAT_S, RETRY_MS = 0.2, 15.0, 2000


class EventWatch:
    """Wakes all streams when any job has a new event, by one look at the store for all of them.

    Args:
        store: all jobs.
        most: streams that may be open.
    """

    def __init__(self, store: JobStore, most: int) -> None:
        self.store = store
        self.slots = Slots(most, "too many streams are open; ask for the state instead")
        self.news = asyncio.Event()
        """Set once, when there is something new, and then replaced: who leaves while he waits holds no lock."""
        self.last = 0

    async def work(self) -> None:
        """Run until it is cancelled."""
        while True:
            await asyncio.sleep(POLL_S)
            if not self.slots.taken:
                continue
            try:
                newest = await asyncio.to_thread(self.store.last_event)
            except (OSError, sqlite3.Error) as error:
                logger.error("the store cannot be read: %s", error)
                continue
            if newest != self.last:
                self.last = newest
                self.news.set()
                self.news = asyncio.Event()

    async def stream(self, job_id: str, after: int) -> AsyncIterator[str]:
        """Events after the one with number ``after``, until the job has its last state."""
        yield f"retry: {RETRY_MS}\n\n"
        while True:
            news = self.news  # before the look: what comes after it sets this one
            events = await asyncio.to_thread(self.store.events, job_id, after)
            for event in events:
                after = event.seq
                yield as_text(event)
            if any(event.type == "state" and event.data["state"] in FINAL for event in events):
                return
            if not events:
                job = await asyncio.to_thread(self.store.get, job_id)
                if job is None or job.final:  # reconnected after the end
                    return
                try:
                    await asyncio.wait_for(news.wait(), HEARTBEAT_S)
                except asyncio.TimeoutError:
                    yield ": still here\n\n"


def as_text(event: Event) -> str:
    """One event in the format of text/event-stream."""
    return f"id: {event.seq}\nevent: {event.type}\ndata: {json.dumps(event.data)}\n\n"
