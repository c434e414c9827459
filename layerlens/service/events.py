"""A job's events as server-sent events; a client that was cut off goes on after the last one it has seen."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

from layerlens.service.store import FINAL, Event, JobStore

POLL_S, HEARTBEAT_S, RETRY_MS = 0.2, 15.0, 2000


class EventWatch:
    """Wakes all streams when any job has a new event, by one look at the store for all of them."""

    def __init__(self, store: JobStore) -> None:
        self.store = store
        self.condition = asyncio.Condition()
        self.streams = 0
        self.last = 0

    async def work(self) -> None:
        """Run until it is cancelled."""
        while True:
            await asyncio.sleep(POLL_S)
            if not self.streams:
                continue
            newest = await asyncio.to_thread(self.store.last_event)
            if newest != self.last:
                self.last = newest
                async with self.condition:
                    self.condition.notify_all()

    async def stream(self, job_id: str, after: int) -> AsyncIterator[str]:
        """Events after the one with number ``after``, until the job has its last state."""
        self.streams += 1
        try:
            yield f"retry: {RETRY_MS}\n\n"
            while True:
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
                    yield await self._wait()
        finally:
            self.streams -= 1

    async def _wait(self) -> str:
        """Nothing when there may be news, a comment that keeps the connection open when there has been none."""
        try:
            async with self.condition:
                await asyncio.wait_for(self.condition.wait(), HEARTBEAT_S)
        except asyncio.TimeoutError:
            return ": still here\n\n"
        return ""


def as_text(event: Event) -> str:
    """One event in the format of text/event-stream."""
    return f"id: {event.seq}\nevent: {event.type}\ndata: {json.dumps(event.data)}\n\n"
