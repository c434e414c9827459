"""A configuration of the whole job that runs in a second or two, and statistics from it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from layerlens.config import RunConfig
from layerlens.pipeline import run_config


@pytest.fixture(scope="session")
def _session_settings(tiny_bert_dir: Path, reviews_jsonl: Path) -> dict[str, Any]:
    return {
        "model": {"name_or_path": str(tiny_bert_dir), "head_fit_samples": 32},
        "data": {"source": str(reviews_jsonl), "calibration_samples": 24, "max_length": 16, "batch_size": 8},
        "profiling": {"adapter_sites": "all"},
        "optimization": {
            "max_trainable_params": 1500,
            "max_flops": 1e6,
            "max_vram_gb": 0.1,
            "latency_target_ms": 50,
            "latency_profile": {"batch_size": 2, "sequence_length": 16},
            "methods": ["lora", "adapter", "prefix"],
            "lora_ranks": [1, 2, 4],
            "adapter_sizes": [1, 2],
            "prefix_lengths": [2, 4],
        },
        "runtime": {"threads": 1, "cache_dir": "cache"},
    }


@pytest.fixture
def settings(_session_settings: dict[str, Any]) -> dict[str, Any]:
    """A configuration that a test may change."""
    return copy.deepcopy(_session_settings)


@pytest.fixture(scope="session")
def saved_statistics(_session_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """statistics.safetensors of one run of the settings."""
    folder = tmp_path_factory.mktemp("saved-statistics")
    return run_config(RunConfig.model_validate(_session_settings), base_dir=folder).files["statistics"]
