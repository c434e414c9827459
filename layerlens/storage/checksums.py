"""``checksums.json``: SHA-256 and size of every file of a published result, written last.

Whoever reads a file of the result holds it against this list: a file of a publication that was cut short, or that is
just being replaced, does not match and is not used.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from pathlib import Path
from typing import Any

from layerlens.exceptions import StorageError
from layerlens.storage.filesystem import exists, redacted

CHECKSUMS_FILE = "checksums.json"
FORMAT = "layerlens-checksums-1"
DEEPEST = 3
"""Folders above a file in which its list is looked for."""

Entry = dict[str, Any]


def sha256_of(path: Path) -> str:
    """SHA-256 of a local file, in pieces, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def entries_of(directory: Path) -> dict[str, Entry]:
    """Name, digest and size of every file below a local directory.

    Raises:
        StorageError: a symbolic link is among them; what it points to may not be meant to leave this machine.
    """
    entries = {}
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            raise StorageError(f"{path} is a symbolic link; results are files, so it is not published")
        if path.is_file():
            name = path.relative_to(directory).as_posix()
            entries[name] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    return entries


def to_bytes(entries: dict[str, Entry]) -> bytes:
    """The file's content."""
    return (json.dumps({"format": FORMAT, "files": entries}, indent=1, sort_keys=True) + "\n").encode()


def read_entries(filesystem: Any, root: str) -> dict[str, Entry] | None:
    """The list in ``root``; None where there is none.

    Raises:
        StorageError: there is one and it cannot be understood.
    """
    path = f"{root}/{CHECKSUMS_FILE}"
    if not exists(filesystem, path):
        return None
    try:
        content = json.loads(filesystem.cat_file(path))
        if content["format"] != FORMAT:
            raise ValueError(content["format"])
        return {
            str(name): {"sha256": str(entry["sha256"]), "bytes": int(entry["bytes"])}
            for name, entry in content["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            f"{redacted(path)} is not a list of checksums; remove it, or publish the result again"
        ) from error


def entry_for(filesystem: Any, path: str) -> Entry | None:
    """What a list above ``path`` says of it; None where no list knows it."""
    folder = posixpath.dirname(path)
    for _ in range(DEEPEST):
        if not folder:
            return None
        entries = read_entries(filesystem, folder)
        if entries is not None:
            return entries.get(posixpath.relpath(path, folder))
        folder = posixpath.dirname(folder)
    return None
