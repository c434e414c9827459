"""Reads the file that wandb writes offline: records of wandb's own protocol in LevelDB's log format."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

BLOCK, HEADER, FILE_HEADER = 32768, 7, 7
FULL, LAST = 1, 4


def records_of(path: Path) -> list[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts, found = path.read_bytes(), FILE_HEADER, b"", []
    assert content.startswith(b":W&B")
    while place + HEADER <= len(content):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        if place + HEADER + length > len(content):  # still being written
            break
        parts += content[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def ended_records_of(path: Path) -> list[Any]:
    """The records when the run's end is among them: wandb's own process may write it after ``finish`` has returned."""
    for _ in range(6000):
        found = records_of(path)
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end of the run")


class OfflineRun:
    """The run below ``folder``: its project, configuration, rows of figures, artefacts and exit code."""

    def __init__(self, folder: Path) -> None:
        (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
        self.project, self.name, self.exit_code = "", "", None
        self.config: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.artifacts: dict[str, list[str]] = {}
        for record in ended_records_of(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.project, self.name = record.run.project, record.run.display_name
                self.config |= values(record.run.config.update)
            elif kind == "config":
                self.config |= values(record.config.update)
            elif kind == "history":
                self.rows.append(values(record.history.item))
            elif kind == "artifact":
                self.artifacts[record.artifact.type] = sorted(one.path for one in record.artifact.manifest.contents)
            elif kind == "exit":
                self.exit_code = record.exit.exit_code

    def series(self, name: str, axis: str) -> dict[int, float]:
        return {int(row[axis]): row[name] for row in self.rows if name in row}


def values(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
