"""Ratios of earlier runs, kept apart for each processor: how far a kernel is ahead of its peers depends on it.

The file holds {processor: {case: ratio}}, where a processor is its vendor, family and the instruction set in use, such
as "AuthenticAMD family 26 avx512": what decides the ratios and stays the same from one cloud machine to the next.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
STORED = Path(__file__).parent / "results" / "kernel_ratios.json"


def processor_key(isa: str, cpuinfo: str | None = None) -> str:
    """Vendor, family and instruction set; where Linux names no vendor, the machine's architecture instead.

    Args:
        isa: what the kernels use, as `layerlens.kernels.isa()` says it.
        cpuinfo: the text of /proc/cpuinfo; read if not given.
    """
    if cpuinfo is None:
        cpuinfo = CPUINFO.read_text(encoding="utf-8") if CPUINFO.exists() else ""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, text = line.partition(":")
        fields.setdefault(name.strip(), text.strip())  # the first processor speaks for all
    if {"vendor_id", "cpu family"} <= fields.keys():
        return f"{fields['vendor_id']} family {fields['cpu family']} {isa}"
    return f"{platform.machine()} {isa}"


def read_ratios(path: Path) -> dict[str, dict[str, float]]:
    """Processor -> case -> ratio; empty if nothing is stored yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def record_ratios(path: Path, processor: str, ratios: dict[str, float]) -> None:
    """Store these cases of one processor; its other cases and the other processors keep what they have."""
    stored = read_ratios(path)
    stored[processor] = {**stored.get(processor, {}), **ratios}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False, encoding="utf-8") as file:
        file.write(json.dumps(stored, indent=1) + "\n")
    os.replace(file.name, path)


def missing_ratios(path: Path, processor: str) -> str | None:
    """What to say where nothing is stored for this processor; None where something is."""
    stored = read_ratios(path)
    if stored.get(processor):
        return None
    return (
        f"no gate: {path.name} has no ratios of {processor} (it has: {', '.join(sorted(stored)) or 'none'}); "
        f"to record them, run this again on a quiet machine with LAYERLENS_BENCHMARK_RECORD=benchmarks/results"
    )
