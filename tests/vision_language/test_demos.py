"""The demos as a user runs them, with the session's models in the cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

DEMOS = Path(__file__).parents[2] / "demos"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llm_yolo_pipeline.py", ("mAP50 0.9", "a demonstration model", "non-maximum suppression", "report.html")),
        ("demo_yolo.py", ("negatives, tuned    0.", "Chosen: LoRA on", "merged", "(largest change 0)")),
    ],
)  # fmt: skip
def test_demo(name: str, expected: tuple[str, ...], model_cache: Path, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, str(DEMOS / name), str(tmp_path)], capture_output=True, text=True, check=False, timeout=600,
        env={**os.environ, "LAYERLENS_CACHE": str(model_cache)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in expected:
        assert words in done.stdout
