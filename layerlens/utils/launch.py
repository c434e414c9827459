"""Which of several processes this one is, as torchrun or another launcher says by environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from layerlens.exceptions import ConfigurationError


@dataclass(frozen=True)
class Place:
    """Which of the processes this one is, as the launcher says by environment variables."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def place_of_this_process(environment: Mapping[str, str] = os.environ) -> Place:
    """This process's place among those of one job; (0 of 1) where no launcher has set RANK and WORLD_SIZE.

    Raises:
        ConfigurationError: the variables are there in part, or contradict each other.

    >>> place_of_this_process({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}).rank
    1
    """
    if "RANK" not in environment and int_of(environment, "WORLD_SIZE", 1) == 1:
        return Place()
    rank, size = int_of(environment, "RANK"), int_of(environment, "WORLD_SIZE")
    if not 0 <= rank < size:
        raise ConfigurationError(f"RANK is {rank} and WORLD_SIZE {size}: ranks go from 0 to {size - 1}")
    if size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not environment.get(name):
                raise ConfigurationError(_incomplete(name, environment))
        int_of(environment, "MASTER_PORT")
    local = int_of(environment, "LOCAL_RANK", rank)
    return Place(rank, size, local, max(local + 1, int_of(environment, "LOCAL_WORLD_SIZE", 1)))


def is_main_process() -> bool:
    """Whether this one writes, publishes and tells; true where there is only one (torchrun and accelerate set RANK)."""
    return int(os.environ.get("RANK", 0)) == 0


def int_of(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """The whole number in an environment variable.

    Raises:
        ConfigurationError: it is not a number, or not there and has no default.
    """
    text = environment.get(name)
    if text is None or not text.strip():
        if default is None:
            raise ConfigurationError(_incomplete(name, environment))
        return default
    try:
        return int(text)
    except ValueError as error:
        raise ConfigurationError(f"environment variable {name}: must be a whole number, got {text!r}") from error


def _incomplete(name: str, environment: Mapping[str, str]) -> str:
    there = ", ".join(each for each in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if environment.get(each))
    return (
        f"{there} {'are' if ',' in there else 'is'} set but {name} is not; start several processes with "
        "`torchrun --nproc-per-node N -m layerlens run config.yaml`, or unset RANK and WORLD_SIZE to run alone"
    )
