"""Every kernel test that takes `isa` runs once per instruction set that this machine has."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerlens.kernels import _dispatch

# pytest's importlib mode does not let test files import their neighbours (kernel_samples.py).
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(params=_dispatch.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _dispatch._force(request.param)
    yield request.param
    _dispatch._force(None)
