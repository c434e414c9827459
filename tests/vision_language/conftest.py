"""Real models for the pipeline, trained once for the session, and images for them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from PIL import Image

# pytest's importlib mode does not let test files import their neighbours; the toy models stand beside the demos.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "demos"))

from toys.detector import cached_detector
from toys.language_model import cached_language_model
from toys.plates import draw_plates, write_dataset


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with both toy models, trained here; processes that test side by side share it."""
    torch.set_num_threads(1)
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "model-cache"
    with FileLock(f"{cache}.lock"):
        cached_detector(cache)
        cached_language_model(cache)
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
