"""Lets the tests of this folder import their neighbour `instances` (pytest's importlib mode does not)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # mmkp_instances
sys.path.insert(0, str(Path(__file__).parent))
