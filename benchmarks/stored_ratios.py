"""Ratios of earlier runs, kept apart for each processor: how far a kernel is ahead of its peers depends on it.

The file holds the wanted ratio of every case, and for each processor its name, where its ratios come from, the ratios
as last recorded, and the best that were ever recorded. A processor is its vendor, family and the instruction set in
use, such as "AuthenticAMD family 26 avx512": what decides the ratios and stays the same from one cloud machine to the
next.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")
STORED = Path(__file__).parent / "results" / "kernel_ratios.json"
FAMILIES = {
    "AuthenticAMD family 25 avx512": "AMD Zen 4",  # Zen 3 has the same number and no AVX-512
    "AuthenticAMD family 26 avx512": "AMD Zen 5",
    "GenuineIntel family 6 avx512": "Intel Xeon",
}


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


def read(path: Path) -> dict[str, Any]:
    """What the file holds; without any processor if there is no file yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"targets": {}, "processors": {}}


def ratios_of(path: Path, processor: str) -> dict[str, float]:
    """Case -> ratio of one processor; empty if nothing is stored for it."""
    return read(path)["processors"].get(processor, {}).get("ratios", {})


def peers_then(path: Path, processor: str, peers: Iterable[str]) -> list[str]:
    """Those of the peers that were among them when the ratios were recorded: a new one must not fail the gate."""
    later = read(path)["processors"].get(processor, {}).get("without", [])
    return [peer for peer in peers if peer not in later]


def best_of(path: Path, processor: str) -> dict[str, float]:
    """Case -> best ratio that one processor ever had."""
    return read(path)["processors"].get(processor, {}).get("best", {})


def record_ratios(path: Path, processor: str, ratios: dict[str, float], targets: dict[str, float]) -> None:
    """Store these cases of one processor; its other cases and the other processors keep what they have."""
    stored = read(path)
    kept, best = ratios_of(path, processor), best_of(path, processor)
    stored["targets"] |= targets
    stored["processors"][processor] = {
        "name": FAMILIES.get(processor, processor),
        "source": "measured by scripts/benchmark.sh",
        "ratios": {**kept, **ratios},
        "best": {**best, **{case: max(ratio, best.get(case, 0.0)) for case, ratio in ratios.items()}},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False, encoding="utf-8") as file:
        file.write(json.dumps(stored, indent=1) + "\n")
    os.replace(file.name, path)


def missing_ratios(path: Path, processor: str) -> str | None:
    """What to say where nothing is stored for this processor; None where something is."""
    if ratios_of(path, processor):
        return None
    names = sorted(f"{key} ({entry['name']})" for key, entry in read(path)["processors"].items())
    return (
        f"no gate: {path.name} has no ratios of {processor} (it has: {', '.join(names) or 'none'}); "
        f"to record them, run this again on a quiet machine with LAYERLENS_BENCHMARK_RECORD=benchmarks/results"
    )


def never_met(path: Path) -> list[str]:
    """For each processor one line with the wanted ratios that it never reached, the furthest first."""
    stored = read(path)
    lines = []
    for processor, entry in stored["processors"].items():
        known = {case: ratio for case, ratio in entry["best"].items() if case in stored["targets"]}
        missed = [(ratio / stored["targets"][case], case, ratio) for case, ratio in known.items()]
        missed = sorted(one for one in missed if one[0] < 1.0)
        told = "; ".join(f"{case} {ratio:.2f} of {stored['targets'][case]:.2f}" for _, case, ratio in missed)
        head = f"{entry['name']} ({processor}), never met: {len(missed)} of {len(known)} wanted ratios"
        lines.append(f"{head}: {told}" if missed else head)
    return lines
