"""One publisher at a time for one URL: a lock object that is put only if it is absent.

Its holder rewrites it with a rising number while it works. Whoever waits watches that number by its own monotonic
clock: a lock whose number stands still for ``STALE_S`` belonged to a process that died, and is taken over. No wall
clock is compared, so clocks that differ or go backwards do no harm.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from layerlens.exceptions import OutputError
from layerlens.storage.filesystem import redacted

LOCK_FILE = ".layerlens-lock"
BEAT_S, STALE_S, PATIENCE_S, POLL_S = 3.0, 20.0, 600.0, 0.25


@contextmanager
def publisher_lock(filesystem: Any, root: str) -> Iterator[None]:
    """Hold the lock of ``root``.

    Raises:
        OutputError: another publisher holds it for longer than ``PATIENCE_S``.
    """
    path, holder = f"{root}/{LOCK_FILE}", uuid.uuid4().hex
    _take(filesystem, path, holder)
    stop = threading.Event()
    beats = threading.Thread(target=_beat, args=(filesystem, path, holder, stop), daemon=True)
    beats.start()
    try:
        yield
    finally:
        stop.set()
        beats.join(timeout=BEAT_S)
        with suppress(Exception):  # a lock that cannot be removed goes stale
            if _holder(filesystem, path).startswith(holder):
                filesystem.rm_file(path)


def _take(filesystem: Any, path: str, holder: str) -> None:
    start = last_change = time.monotonic()
    seen = ""
    while True:
        try:
            filesystem.pipe_file(path, _content(holder, 0), mode="create")
            return
        except FileExistsError:
            pass
        now = time.monotonic()
        current = _holder(filesystem, path)
        if current != seen:
            seen, last_change = current, now
        elif now - last_change > STALE_S:
            with suppress(FileNotFoundError):
                filesystem.rm_file(path)  # then everyone who waits tries again, and one of them gets it
            last_change = now
            continue
        if now - start > PATIENCE_S:
            raise OutputError(
                f"{redacted(path)}: another run has been publishing here for {PATIENCE_S / 60:.0f} minutes; wait for "
                "it, or choose another output directory"
            )
        time.sleep(POLL_S)


def _beat(filesystem: Any, path: str, holder: str, stop: threading.Event) -> None:
    count = 0
    while not stop.wait(BEAT_S):
        count += 1
        with suppress(Exception):  # the copy that the lock protects will fail and say so
            filesystem.pipe_file(path, _content(holder, count))


def _content(holder: str, count: int) -> bytes:
    return json.dumps({"holder": holder, "count": count}).encode()


def _holder(filesystem: Any, path: str) -> str:
    """Holder and count, as one text; "" when the lock has gone."""
    try:
        content = json.loads(filesystem.cat_file(path))
        return f"{content['holder']} {content['count']}"
    except (FileNotFoundError, ValueError, KeyError):
        return ""
