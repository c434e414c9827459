"""Real models for the pipeline, trained once for the session, and images for them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from layerlens.data.plates import draw_plates
from layerlens.jobs.builtin_models import builtin_detector, builtin_language_model

# pytest's importlib mode does not let test files import their neighbours.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with both builtin models, trained here."""
    torch.set_num_threads(1)
    cache = tmp_path_factory.mktemp("model-cache")
    builtin_detector(cache)
    builtin_language_model(cache)
    return cache


@pytest.fixture
def builtin_models(model_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``builtin:plates`` means the session's models."""
    monkeypatch.setenv("LAYERLENS_CACHE", str(model_cache))
    return model_cache


@pytest.fixture(scope="session")
def detector_weights(model_cache: Path) -> Path:
    return builtin_detector(model_cache)


@pytest.fixture(scope="session")
def language_model_dir(model_cache: Path) -> Path:
    return builtin_language_model(model_cache)


@pytest.fixture(scope="session")
def plates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four plates that have findings."""
    folder = tmp_path_factory.mktemp("plates")
    with_findings = [plate for plate in draw_plates(12, 77) if plate.labels]
    for index, plate in enumerate(with_findings[:4]):
        Image.fromarray(plate.pixels).save(folder / f"plate{index}.png")
    return folder
