"""Image, detection, boxes, language model, report: the whole pipeline with the time of every step, without any hub.

    python demos/llm_yolo_pipeline.py [OUTPUT]

Needs `pip install 'layerlens[vision]'`. The detector and the language model are trained here the first time, on drawn
plates and on generated findings and reports, and kept in the cache. For a real language model give
`layerlens pipeline --llm` a directory, a hub name or the URL of an OpenAI-compatible server.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image
from rich.console import Console

from layerlens.cli.pipeline_tables import show
from layerlens.config.vision_language import PipelineConfig
from layerlens.data.plates import CLASSES, draw_plates
from layerlens.jobs.builtin_models import builtin_detector, builtin_language_model
from layerlens.jobs.vision_language import run_vision_language
from layerlens.utils.places import default_cache_dir
from layerlens.vision_language.demo_detector import HELD_OUT_PLATES, held_out_precision
from layerlens.vision_language.demo_language_model import DESCRIPTION

IMAGES, REPEATS, SEED = 6, 3, 40_004


def main() -> None:
    """Run the demonstration."""
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "out" / "pipeline"
    cache = default_cache_dir()
    weights, language_model = builtin_detector(cache), builtin_language_model(cache)
    print(f"Detector: {weights}, mAP50 {held_out_precision(weights)['map50']:.3f} on {HELD_OUT_PLATES} held-out plates")
    print(f"Language model: {language_model}, {DESCRIPTION}; it words findings and can do nothing else")
    folder = output / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for index, plate in enumerate(draw_plates(IMAGES, SEED)):
        Image.fromarray(plate.pixels).save(folder / f"plate{index}.png")
        planted = ", ".join(CLASSES[label] for label in plate.labels) or "nothing"
        print(f"  plate{index}.png: planted {planted}")
    config = PipelineConfig(images=(str(folder),), detector="builtin:plates", llm="builtin:plates", repeats=REPEATS)
    show(run_vision_language(config, output), Console())


if __name__ == "__main__":
    main()
