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

import torch

from layerlens.config import RunConfig
from layerlens.exceptions import ConfigurationError, OutputError
from layerlens.integrations.placement import offloaded
from layerlens.utils.processes import Processes

VISIBLE_WITHIN_S = 5.0
"""Network file systems show a new file to other machines after a moment."""


def same_configuration(processes: Processes, config: RunConfig) -> None:
    """Make sure that all processes were given the same configuration.

    Raises:
        ConfigurationError: names the first key that differs, and in which process.
    """
    for rank, name, first, there in _differences(processes.everyone("configuration", config.model_dump(mode="json"))):
        raise ConfigurationError(
            f"process {rank} has another configuration than process 0: {name} is {there!r} there and {first!r} in "
            "process 0; give all processes the same file"
        )


def _differences(told: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, str, Any, Any]]:
    """(process, key, value in process 0, value there) of the first key by which each process differs from process 0."""
    for rank, other in enumerate(told):
        found = first_difference(told[0], other)
        if found is not None:
            yield (rank, *found)


def refuse_spread(config: RunConfig, processes: Processes) -> None:
    """Refuse what this number of processes cannot do; ``config.compatibility`` has what none can.

    Raises:
        ConfigurationError: names the key, and what would work.
    """
    sharded = config.distributed.sharding != "none"
    limited = config.profiling.limits_memory
    if processes.alone and sharded:
        raise ConfigurationError(
            "distributed.sharding: fsdp: only one process was started; start several with torchrun --nproc-per-node N"
        )
    if not processes.alone and limited is not None:
        raise ConfigurationError(
            f"{limited}: for one process; with several give distributed.sharding: fsdp, or start one"
        )
    if not processes.alone and not sharded and config.model.device_map is not None:
        raise ConfigurationError(
            "model.device_map: one process places the model on all devices of its machine; run it without torchrun, or "
            "spread it over the processes with distributed.sharding: fsdp instead"
        )


def refuse_untrainable(model: torch.nn.Module, config: RunConfig) -> None:
    """Refuse to train options on a model that accelerate keeps elsewhere between passes.

    Raises:
        ConfigurationError: proxies or a proxy check are asked for.
    """
    if not offloaded(model):
        return
    reason = "nothing is trained on a model with weights off their device (model.device_map)"
    if config.profiling.proxies.options:
        raise ConfigurationError(
            f"profiling.proxies: {reason}; set proxies.options: 0, or place the whole model on devices"
        )
    if config.optimization.proxy_check.steps:
        raise ConfigurationError(
            f"optimization.proxy_check: {reason}; set proxy_check.steps: 0, or place the whole model on devices"
        )


def same_measurement(processes: Processes, identity: dict[str, Any]) -> None:
    """Make sure that all processes loaded the same model and data with the same versions.

    Raises:
        ConfigurationError: names the first thing that differs, and in which process.
    """
    for rank, name, first, there in _differences(processes.everyone("identity", identity)):
        raise ConfigurationError(
            f"process {rank} would measure something else than process 0: {name} is {there!r} there and {first!r} "
            "in process 0; give all machines the same model, data and versions"
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
