"""The name of this machine's processor, for results and device profiles."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name() -> str:
    """Such as "Intel(R) Xeon(R) Processor"; the architecture if the system does not name the model."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # no /proc, or no such line, as on ARM
        return platform.processor() or platform.machine()
