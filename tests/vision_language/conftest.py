"""Real models for the pipeline, as benchmarks/toy_models.py trained them, and images for them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

# pytest's importlib mode does not let test files import their neighbours; the toy models stand beside the demos.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "demos"))

from stored_models import put_models
from toys.detector import cached_detector
from toys.language_model import cached_language_model
from toys.plates import draw_plates, write_dataset


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with both toy models."""
    cache = tmp_path_factory.mktemp("model-cache")
    put_models(cache)
    return cache


@pytest.fixture(scope="session")
def detector_weights(model_cache: Path) -> Path:
    return cached_detector(model_cache)


@pytest.fixture(scope="session")
def language_model_dir(model_cache: Path) -> Path:
    return cached_language_model(model_cache)


@pytest.fixture(scope="session")
def plates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four plates that have findings."""
    folder = tmp_path_factory.mktemp("plates")
    with_findings = [plate for plate in draw_plates(12, 77) if plate.labels]
    for index, plate in enumerate(with_findings[:4]):
        Image.fromarray(plate.pixels).save(folder / f"plate{index}.png")
    return folder


@pytest.fixture(scope="session")
def plates_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A YOLO data set of 400 plates, none of which the detector was trained or judged on."""
    return str(write_dataset(tmp_path_factory.mktemp("plates-data"), draw_plates(400, 20_002)))
