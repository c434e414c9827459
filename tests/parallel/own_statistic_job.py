"""A job with a statistic that every process registers for itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ranks

sys.path.insert(0, str(Path(__file__).parents[1] / "profiling"))


def run(settings: dict[str, Any], base_dir: Path) -> tuple[bytes, dict[str, str]]:
    """See ``ranks.run``."""
    from own_statistic import registered

    with registered():
        return ranks.run(settings, base_dir)
