"""What the pages take for granted: a model, and a way to import the neighbours of these tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def pages_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all pages: what they have in common is measured once, the device among it."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def small_model_dir(make_bert_dir: Callable[..., Path]) -> Path:
    """A small random BERT with BERT's 512 positions."""
    return make_bert_dir()
