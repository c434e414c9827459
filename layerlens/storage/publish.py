"""Putting a finished result directory to a URL so that nobody takes a part of it for the whole.

Everything is uploaded to a folder of its own first, which is what takes time and what can fail. Then, under a lock,
the store copies each object to its place (one object appears as a whole), ``manifest.json`` last, and after it the
list of checksums, against which every file is held when it is read.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from layerlens.exceptions import OutputError
from layerlens.storage.checksums import CHECKSUMS_FILE, entries_of, read_entries, to_bytes
from layerlens.storage.filesystem import exists, open_url, redacted, writing
from layerlens.storage.lock import publisher_lock

LAST = "manifest.json"
PROBE = b"layerlens can write here\n"


def check_publishable(url: str) -> None:
    """Make sure, before minutes of work, that ``url`` can be written; leaves nothing behind.

    Raises:
        ConfigurationError: the scheme is unknown or its driver missing.
        OutputError: a small object cannot be written there, read and removed.
    """
    filesystem, root = open_url(url)
    path = f"{root}/.layerlens-probe-{uuid.uuid4().hex}"
    with writing(url):
        filesystem.pipe_file(path, PROBE)
        if filesystem.cat_file(path) != PROBE:
            raise OutputError(f"cannot write {redacted(url)}: the store returns other content than was written")
        filesystem.rm_file(path)


def publish(directory: Path, url: str, owned: Collection[str] = ()) -> None:
    """Make the files below ``directory`` the result at ``url``; other objects there stay.

    Args:
        directory: a finished result.
        url: where it goes; made if the store has folders.
        owned: first names of what belongs to the writer: those that ``directory`` lacks are removed at ``url``.

    Raises:
        OutputError: the store cannot be reached or written. Until the last copy, readers find the earlier result or a
            line that says that the files do not match; a part is never taken for the whole.
    """
    filesystem, root = open_url(url)
    entries = entries_of(directory)
    upload = f"{root}/.layerlens-upload-{uuid.uuid4().hex}"
    with writing(url):
        try:
            for name, entry in entries.items():
                filesystem.put_file(str(directory / name), f"{upload}/{name}")
                stored = filesystem.size(f"{upload}/{name}")
                if stored != entry["bytes"]:
                    raise OutputError(
                        f"cannot write {redacted(url)}: the store kept {stored} of the {entry['bytes']} bytes of {name}"
                    )
            with publisher_lock(filesystem, root):
                _show(filesystem, root, upload, entries, owned)
        finally:
            with suppress(Exception):  # what cannot be removed now hides behind its dot
                filesystem.rm(upload, recursive=True)


def _show(filesystem: Any, root: str, upload: str, entries: dict[str, Any], owned: Collection[str]) -> None:
    """Copy the uploaded objects to their places, and make the list of checksums say so."""
    before = read_entries(filesystem, root) or {}
    replaced = {name for name in before if name.partition("/")[0] in owned or name in entries}
    for name in sorted(entries, key=lambda name: (name == LAST, name)):
        filesystem.cp_file(f"{upload}/{name}", f"{root}/{name}")
    kept = {name: entry for name, entry in before.items() if name not in replaced}
    filesystem.pipe_file(f"{root}/{CHECKSUMS_FILE}", to_bytes(kept | entries))
    written = {name.partition("/")[0] for name in entries}
    for name in sorted(replaced - set(entries)):
        with suppress(FileNotFoundError):
            filesystem.rm_file(f"{root}/{name}")
    for name in sorted(set(owned) - written):
        if exists(filesystem, f"{root}/{name}"):
            filesystem.rm(f"{root}/{name}", recursive=True)
