"""How long the stages of a job took; whoever observes the job is told of each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from layerlens.utils.observer import observed_stage


@dataclass
class Clock:
    """Wall time of each stage, in seconds."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with observed_stage(name):
                yield
        finally:
            self.seconds[name] = time.perf_counter() - start
