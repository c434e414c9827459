"""What several processes must agree on before they measure together: configuration, cache, and what is measured."""

from __future__ import annotations

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerlens.exceptions import ConfigurationError, OutputError
from layerlens.utils.processes import Processes

VISIBLE_WITHIN_S = 5.0
"""Network file systems show a new file to other machines after a moment."""


def _differences(told: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, str, Any, Any]]:
    """(process, key, value in process 0, value there) of the first key by which each process differs from process 0."""
    for rank, other in enumerate(told):
        found = first_difference(told[0], other)
        if found is not None:
            yield (rank, *found)


def same_everywhere(processes: Processes, topic: str, told: dict[str, Any]) -> None:
    """Make sure that all processes say the same: of their configuration, and of what each would measure.

    Args:
        processes: all of them must call this.
        topic: "configuration" or "identity".
        told: what this one says, as JSON values.

    Raises:
        ConfigurationError: names the first thing that differs, and in which process.
    """
    differs, remedy = {
        "configuration": ("has another configuration than", "give all processes the same file"),
        "identity": ("would measure something else than", "give all machines the same model, data and versions"),
    }[topic]
    for rank, name, first, there in _differences(processes.everyone(topic, told)):
        raise ConfigurationError(
            f"process {rank} {differs} process 0: {name} is {there!r} there and {first!r} in process 0; {remedy}"
        )


def shared_directory(processes: Processes, directory: Path) -> None:
    """Make sure that what process 0 writes into ``directory`` is seen by all processes.

    Raises:
        OutputError: a process does not see it, so an interrupted run could not be taken up.
    """
    if processes.alone:
        return
    name = f".shared-{uuid.uuid4().hex}"
    if processes.first:
        try:
            (directory / name).touch()
        except OSError as error:
            raise OutputError(f"runtime.cache_dir: cannot write {directory}: {error.strerror}") from error
    name, written_to = processes.from_first("probe", (name, str(directory.absolute())))
    try:
        end = time.monotonic() + VISIBLE_WITHIN_S
        while not (seen := name in os.listdir(directory)) and time.monotonic() < end:
            time.sleep(0.1)
        told = processes.everyone("sees the cache", (seen, socket.gethostname()))
    finally:
        if processes.first:
            with contextlib.suppress(OSError):
                (directory / name).unlink(missing_ok=True)
    for rank, (sees, host) in enumerate(told):
        if not sees:
            raise OutputError(
                f"runtime.cache_dir: process {rank} on {host} does not see what process 0 wrote to {written_to}; give "
                "a directory that all machines share, or run with --no-cache"
            )


def first_difference(one: Any, other: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """(dotted name, value, other value) of the first difference between two JSON values; None where they are equal.

    >>> first_difference({"a": {"b": 1}}, {"a": {"b": 2}})
    ('a.b', 1, 2)
    """
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            found = first_difference(one.get(key), other.get(key), f"{name}.{key}".lstrip("."))
            if found is not None:
                return found
        return None
    return None if one == other else (name, one, other)
