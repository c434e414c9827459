"""Statistics of a tiny model, and a job on them that takes a fraction of a second."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# pytest's importlib mode does not let test files import their neighbours.
sys.path.insert(0, str(Path(__file__).parent))

from layerlens.config import RunConfig
from layerlens.pipeline import RunResult, optimize_statistics, run_config


def settings_of(model: str, data: str, **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"name_or_path": model, "head_fit_samples": 16},
            "data": {"source": data, "calibration_samples": 16, "max_length": 12},
            "optimization": {
                "max_trainable_params": 1500,
                "max_vram_gb": 1,
                "lora_ranks": [1, 2],
                "latency_profile": {"batch_size": 2, "sequence_length": 12},
            },
            "runtime": {"threads": 1, "cache_dir": "cache"},
            **sections,
        }
    )


@pytest.fixture(scope="session")
def tiny_settings(tiny_bert_dir: Path, reviews_jsonl: Path) -> Callable[..., RunConfig]:
    """``tiny_settings(telemetry={...})``: a configuration of the tiny model."""
    return lambda **sections: settings_of(str(tiny_bert_dir), str(reviews_jsonl), **sections)


@pytest.fixture(scope="session")
def tiny_run(tiny_settings: Callable[..., RunConfig]) -> Callable[..., RunResult]:
    """``tiny_run(folder, telemetry={...})``: a whole run."""
    return lambda folder, **sections: run_config(tiny_settings(**sections), base_dir=folder)


@pytest.fixture(scope="session")
def statistics(tiny_run: Callable[..., RunResult], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("statistics")).files["statistics"]


@pytest.fixture(scope="session")
def tiny_optimize(tiny_settings: Callable[..., RunConfig], statistics: Path) -> Callable[..., RunResult]:
    """``tiny_optimize(folder, telemetry={...})``: choose again from statistics."""
    return lambda folder, **sections: optimize_statistics(statistics, tiny_settings(**sections), base_dir=folder)
