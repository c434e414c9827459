"""Paired measurement: all candidates on the same buffers, in rotating order, compared round by round.

On a machine with other work a single time says little; the median over rounds of the ratio of two times taken moments
apart says much more. A candidate that writes large temporaries evicts the next one's data, so the order rotates and
every candidate gets that neighbour equally often.

Candidates with threads of their own get a second care, `settle_s`: another library's idle workers spin for some
milliseconds and would hold the second core, and a worker that has slept is often woken on its caller's core. So each
timing comes after a pause in which all workers fall asleep and as long a stretch of untimed calls that wake its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """Times of one call, in seconds, [round], per candidate."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def speedup(self, name: str, over: str) -> float:
        """Median over the rounds of time(over) / time(name): above 1 where `name` is faster."""
        pairs = zip(self.seconds[over], self.seconds[name], strict=True)
        return statistics.median(other / own for other, own in pairs)


def measure(
    candidates: dict[str, Callable[[], object]],
    *,
    budget_s: float = 0.5,
    warm_calls: int = 3,
    settle_s: float = 0.0,
) -> Measured:
    """Time each candidate in every round; short ones are repeated within a round so that the clock does not matter."""
    repeats = {}
    for name, call in candidates.items():
        for _ in range(warm_calls):
            start = time.perf_counter()
            call()
            once = time.perf_counter() - start
        repeats[name] = max(1, min(1000, int(200e-6 / max(once, 1e-7))))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    end = time.perf_counter() + budget_s
    turn = 0
    while turn < 2 * len(names) + 1 or (time.perf_counter() < end and turn < 500):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            call, count = candidates[name], repeats[name]
            if settle_s > 0.0:
                time.sleep(settle_s)
                settled = time.perf_counter() + settle_s
                while time.perf_counter() < settled:
                    call()
            start = time.perf_counter()
            for _ in range(count):
                call()
            seconds[name].append((time.perf_counter() - start) / count)
        turn += 1
    return Measured(seconds)
