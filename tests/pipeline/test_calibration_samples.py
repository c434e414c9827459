"""How many samples are measured where the configuration does not say."""

from __future__ import annotations

from typing import Any

import pytest

from layerlens.config import RunConfig
from layerlens.jobs.inputs import calibration_samples

SETTINGS: dict[str, Any] = {
    "model": {"name_or_path": "folder", "task": "sequence-classification"},
    "data": {"source": "rows.jsonl"},
    "optimization": {"max_trainable_params": 1000},
}


def samples_of(n_samples: int, **sections: dict[str, Any]) -> int:
    return calibration_samples(RunConfig.model_validate(SETTINGS | sections), n_samples)


@pytest.mark.parametrize(
    ("n_samples", "training", "expected"),
    [
        (100, {}, 16),  # 85 rows, three times: 255 / 50 is below the fewest
        (1000, {}, 51),  # 3 · 850 / 50
        (1000, {"epochs": 1}, 17),
        (1000, {"train_samples": 400}, 24),
        (100_000, {}, 256),
        (100_000, {"max_steps": 100}, 32),  # 100 · 16 / 50
        (100_000, {"max_steps": 100, "batch_size": 8, "gradient_accumulation": 4}, 64),
    ],
)
def test_as_many_as_a_fiftieth_of_the_fine_tune(n_samples: int, training: dict[str, Any], expected: int) -> None:
    assert samples_of(n_samples, training=training) == expected


@pytest.mark.parametrize(
    "profiling",
    [
        {"utility_model": "whitened"},
        {"utility_model": "signal"},
        {"statistics": ["fisher"]},
        {"proxies": {"options": 4}},
        {"utility_model": "weighted", "metric_weights": {"fisher": 1.0}},
    ],
)
def test_what_needs_many_samples_gets_them(profiling: dict[str, Any]) -> None:
    assert samples_of(100, profiling=profiling) == 256


def test_what_is_asked_for_is_taken() -> None:
    assert samples_of(100_000, data=SETTINGS["data"] | {"calibration_samples": 5}) == 5


def test_a_check_by_short_training_does_not_change_it() -> None:
    checked = SETTINGS["optimization"] | {"proxy_check": {"steps": 10}}
    assert samples_of(1000, optimization=checked) == 51
