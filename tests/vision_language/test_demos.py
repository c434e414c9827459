"""The demos as a user runs them, on fewer plates and steps, with the session's models in the cache."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

DEMOS = Path(__file__).parents[2] / "demos"


def loaded(file: str) -> ModuleType:
    spec = spec_from_file_location(Path(file).stem, DEMOS / file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("file", "fewer", "expected"),
    [
        (
            "llm_yolo_pipeline.py",
            {"IMAGES": 2, "REPEATS": 1},
            ("mAP50 0.9", "a demonstration model", "non-maximum suppression", "report.html"),
        ),
        (
            "demo_yolo.py",
            {"EPOCHS": 1, "NEGATIVES": 48, "JUDGED": 16},
            ("negatives, tuned    0.", "Chosen: LoRA on", "merged", "(largest change 0)"),
        ),
    ],
)
def test_demo(
    file: str, fewer: dict[str, int], expected: tuple[str, ...], model_cache: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.setenv("LAYERLENS_CACHE", str(model_cache))
    monkeypatch.setattr(sys, "argv", [file, str(tmp_path)])
    demo = loaded(file)
    for constant, value in fewer.items():
        monkeypatch.setattr(demo, constant, value)
    demo.main()
    said = capsys.readouterr().out
    for words in expected:
        assert words in said, said
