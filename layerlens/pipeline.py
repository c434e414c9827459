"""The whole job, told like a recipe.

``run_pipeline`` is the origin's interface: scalar statistics in, manifest out. ``run_config`` is ``layerlens run``: a
real model and real data in; manifest, adapter directory and report out. ``optimize_statistics`` starts from saved
statistics.
"""

from layerlens.jobs.frontier import FrontierResult, trace_frontier
from layerlens.jobs.origin import run_pipeline
from layerlens.jobs.result import RunResult
from layerlens.jobs.run import optimize_statistics, run_config

__all__ = [
    "FrontierResult",
    "RunResult",
    "optimize_statistics",
    "run_config",
    "run_pipeline",
    "trace_frontier",
]
