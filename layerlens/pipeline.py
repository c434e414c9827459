"""The whole job as one function.

``run_config`` is ``layerlens run``: it takes a real model and real data, and writes the manifest, the adapter directory
and the report. ``optimize_statistics`` starts from saved statistics. ``run_pipeline`` is the interface of the first
version: it takes scalar statistics and writes a manifest. Each is imported on first use, because only ``run_config``
needs torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerlens.jobs.frontier import FrontierResult, trace_frontier
    from layerlens.jobs.optimize import optimize_statistics
    from layerlens.jobs.origin import run_pipeline
    from layerlens.jobs.result import RunResult
    from layerlens.jobs.run import run_config

_PLACES = {
    "FrontierResult": "layerlens.jobs.frontier",
    "RunResult": "layerlens.jobs.result",
    "optimize_statistics": "layerlens.jobs.optimize",
    "run_config": "layerlens.jobs.run",
    "run_pipeline": "layerlens.jobs.origin",
    "trace_frontier": "layerlens.jobs.frontier",
}
"""Where each public name is."""
__all__ = [
    "FrontierResult",
    "RunResult",
    "optimize_statistics",
    "run_config",
    "run_pipeline",
    "trace_frontier",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        found = globals()[name] = getattr(importlib.import_module(_PLACES[name]), name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
