"""What pieces of work allocate, by torch's own allocator: exact, whatever else runs on the machine.

On a CPU the events of ``torch.profiler`` say it, on a GPU the statistics of its allocator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from layerlens.utils.quiet import quiet_profiler

_MARK = "layerlens.work"


def peaks_of(works: Sequence[Callable[[], object]]) -> list[int]:
    """Most bytes that torch had allocated at one time during each, above what was there when it began.

    What one returns is let go before the next begins.
    """
    if torch.cuda.is_available():
        return [_on_gpu(work) for work in works]
    from torch.profiler import ProfilerActivity, profile, record_function

    quiet_profiler()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for work in works:
            with record_function(_MARK):
                work()
    recorded: Any = profiler.profiler
    events = recorded.kineto_results.events()
    spans = sorted((event.start_ns(), event.end_ns()) for event in events if event.name() == _MARK)
    changes = sorted(
        ((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"),
        key=lambda change: change[0],
    )
    found, place = [], 0
    for start, end in spans:
        alive = peak = 0
        while place < len(changes) and changes[place][0] <= end:
            if changes[place][0] >= start:
                alive += changes[place][1]
                peak = max(peak, alive)
            place += 1
        found.append(peak)
    return found


def _on_gpu(work: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - before
