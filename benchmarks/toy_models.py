"""The demos' models, trained afresh: how good they are, and both demos on them as a user runs them.

    python -m benchmarks.toy_models --out benchmarks/results/toy_models.json     three minutes of processor time
    python -m benchmarks.toy_models --write                                      and keep them for the tests

The tests take the weights in ``tests/vision_language/models``, so that what they see depends on no processor's
rounding during training. ``--write`` renews those; do it when plates, examples, architecture or training change.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "demos"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "vision_language"))

from stored_models import write_models
from toys.detector import HELD_OUT_SEED, cached_detector, held_out_precision
from toys.language_model import cached_language_model, share_of_right_findings
from toys.plates import draw_plates

from layerlens.integrations.ultralytics import load_detector
from layerlens.sources import load_pretrained
from layerlens.vision_language.local_model import LocalModel
from layerlens.vision_language.prompt import build_messages, check_report

ROOT = Path(__file__).resolve().parents[1]
WANTED = {"map50": 0.9, "right_findings": 0.8, "right_reports": 19}
DEMOS = {
    "llm_yolo_pipeline.py": ("mAP50 0.9", "a demonstration model", "non-maximum suppression", "report.html"),
    "demo_yolo.py": ("negatives, tuned    0.", "Chosen: LoRA on", "merged", "(largest change 0)"),
}
REPORTS = 20


def right_reports(weights: Path, language_model: Path) -> int:
    """How many of the first 20 held-out plates with findings get a report that says what the boxes say."""
    loaded = load_pretrained(str(language_model), "causal-lm", [])
    model, detector = LocalModel(loaded.model, loaded.tokenizer, "toy"), load_detector(weights, fuse=True)
    right: list[bool] = []
    for plate in draw_plates(2 * REPORTS, HELD_OUT_SEED):
        image = Image.fromarray(plate.pixels).convert("RGB")
        (found,) = detector.suppress(detector.infer(detector.preprocess(image)[None]), [image.size])
        if found and len(right) < REPORTS:
            report = model.generate(build_messages(found, image="plate.png", size=image.size), 160).text
            right.append(not any(check_report(report, found, detector.names, image.size).values()))
    return right.count(True)


def demo_says(name: str, cache: Path, folder: Path) -> bool:
    """Whether a demo ends well and says what its page promises."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "demos" / name), str(folder)], capture_output=True, text=True, check=False,
        env={**os.environ, "LAYERLENS_CACHE": str(cache)},
    )  # fmt: skip
    return done.returncode == 0 and all(words in done.stdout for words in DEMOS[name])


def main() -> int:
    """Train, judge, run; the exit status is 1 where something is worse than wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--write", action="store_true", help="keep the weights for the tests")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        cache, found, start = Path(name), dict[str, Any](), time.process_time()
        weights, language_model = cached_detector(cache), cached_language_model(cache)
        found["training_processor_s"] = round(time.process_time() - start, 1)
        found["map50"] = round(held_out_precision(weights)["map50"], 4)
        loaded = load_pretrained(str(language_model), "causal-lm", [])
        found["right_findings"] = share_of_right_findings(LocalModel(loaded.model, loaded.tokenizer, "toy"))
        found["right_reports"] = right_reports(weights, language_model)
        found["demos"] = {demo: demo_says(demo, cache, cache / demo) for demo in DEMOS}
        if arguments.write:
            write_models(weights, language_model)
            shutil.rmtree(cache / "models")
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    return int(not all(found["demos"].values()) or any(found[each] < least for each, least in WANTED.items()))


if __name__ == "__main__":
    sys.exit(main())
