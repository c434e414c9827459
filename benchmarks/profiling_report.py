"""The tables of ``results/profiling.md``, made from ``results/profiling.json`` (see ``profiling_benchmark.py``).

python benchmarks/profiling_report.py benchmarks/results/profiling.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

INTRODUCTION = """\
# Cost of the statistics

<!-- Made from profiling.json by benchmarks/profiling_report.py; `python benchmarks/profiling_benchmark.py --out \
benchmarks/results/profiling.json` remakes both. -->

Ratios to one ordinary training step (forward and backward, all weights) of the same model and batch, median over
interleaved rounds, with the range; statistics of every Linear. MiniLM with 32 × 64 tokens, BERT-base with 8 × 64,
ViT-base with 2 images of 224 × 224, SmolLM2-135M with 4 × 128 tokens. {machine}.
"""


def page(content: dict[str, Any]) -> str:
    """The whole page."""
    machine = content["machine"]
    told = f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, load {machine['load']}"
    parts = [INTRODUCTION.format(machine=told), *_times(content["results"]), *_memory(content["results"])]
    return "\n".join([*parts, *_peers(content["peers"])]) + "\n"


def _times(results: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys((row["model"], row["dtype"], row["threads"]) for row in results))
    found = {(row["row"], row["model"], row["dtype"], row["threads"]): row for row in results}
    rows = [row for row in dict.fromkeys(row["row"] for row in results) if row != "ordinary step"]
    heads = [f"{model} {dtype}, {threads} thread{'s' * (threads > 1)}" for model, dtype, threads in columns]
    lines = ["", "| what | " + " | ".join(heads) + " | target |", "|---" * (len(heads) + 2) + "|"]
    for row in rows:
        cells, targets = [], {}
        for column in columns:
            entry = found.get((row, *column))
            if entry is None:
                cells.append("–")
                continue
            low, high = entry["ratio_range"]
            missed = entry["target"] is not None and entry["ratio"] > entry["target"]
            ratio = f"**{entry['ratio']:.2f}**" if missed else f"{entry['ratio']:.2f}"
            cells.append(f"{ratio} ({low:.2f}-{high:.2f})")
            if entry["target"] is not None:
                targets[column[1]] = entry["target"]
        target = ", ".join(f"{dtype} ≤ {value}" for dtype, value in targets.items()) or "–"
        lines.append(f"| {row} | " + " | ".join(cells) + f" | {target} |")
    return [*lines, "", "Bold: target missed."]


def _memory(results: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys((row["model"], row["dtype"]) for row in results))
    found = {(row["row"], row["model"], row["dtype"]): row for row in results}
    lines = [
        "", "Peak memory above the weights in MB (1e6 bytes), one step in a process of its own (high-water mark of",
        "resident memory), and with activation checkpointing where that was measured:", "",
        "| what | " + " | ".join(f"{model} {dtype}" for model, dtype in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]  # fmt: skip
    for row in dict.fromkeys(row["row"] for row in results):
        entries = [found.get((row, *column)) for column in columns]
        entries = [entry if entry and "peak_mb" in entry else None for entry in entries]  # times alone were measured
        lines.append(f"| {row} | " + " | ".join("–" if e is None else str(e["peak_mb"]) for e in entries) + " |")
        if any(e and e["peak_mb_checkpointed"] is not None for e in entries):
            cells = ["–" if e is None else str(e["peak_mb_checkpointed"]) for e in entries]
            lines.append(f"| {row}, checkpointed | " + " | ".join(cells) + " |")
    return lines


def _peers(peers: list[dict[str, Any]]) -> list[str]:
    if not peers:
        return ["", "The peers were not measured."]
    models = list(dict.fromkeys(row["model"] for row in peers))
    found = {(row["peer"], row["model"]): row for row in peers}
    lines = [
        "", "Peers, float32, every Linear, `benchmarks/profiling_peers.py`:", "",
        "| peer | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|",
    ]  # fmt: skip
    for peer in dict.fromkeys(row["peer"] for row in peers):
        cells = []
        for model in models:
            row = found.get((peer, model), {})
            cells.append(
                f"{row['ratio']:.2f}" if "ratio" in row else row.get("fails", "not measured").replace("|", "/")
            )
        lines.append(f"| {peer} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    source = Path(sys.argv[1])
    source.with_suffix(".md").write_text(page(json.loads(source.read_text())))
