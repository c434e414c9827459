"""Image, detection, boxes, language model, report: the whole pipeline with the time of every step, without any hub.

    python demos/llm_yolo_pipeline.py [OUTPUT]

Needs `pip install 'layerlens[vision]'`. The detector and the language model are trained here the first time, on drawn
plates and on generated findings and reports, and kept in the cache. For your own give `layerlens pipeline`
--detector a .pt file and --llm a directory, a hub name or the URL of an OpenAI-compatible server.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image
from rich.console import Console
from toys.detector import HELD_OUT_PLATES, cached_detector, held_out_precision
from toys.language_model import DESCRIPTION, cached_language_model
from toys.plates import CLASSES, draw_plates

from layerlens.cli.pipeline_tables import show
from layerlens.cli.progress import shown_progress
from layerlens.config.vision_language import PipelineConfig
from layerlens.jobs.vision_language import run_vision_language
from layerlens.utils.places import default_cache_dir

IMAGES, REPEATS, SEED = 6, 3, 40_004


def main() -> None:
    """Run the demonstration."""
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "out" / "pipeline"
    cache = default_cache_dir()
    console = Console(stderr=True)
    with shown_progress(console) as progress:
        weights = cached_detector(cache, progress=progress)
        language_model = cached_language_model(cache, progress=progress)
    print(f"Detector: {weights}, mAP50 {held_out_precision(weights)['map50']:.3f} on {HELD_OUT_PLATES} held-out plates")
    print(f"Language model: {language_model}, {DESCRIPTION}; it words findings and can do nothing else")
    folder = output / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for index, plate in enumerate(draw_plates(IMAGES, SEED)):
        Image.fromarray(plate.pixels).save(folder / f"plate{index}.png")
        planted = ", ".join(CLASSES[label] for label in plate.labels) or "nothing"
        print(f"  plate{index}.png: planted {planted}")
    config = PipelineConfig(images=(str(folder),), detector=str(weights), llm=str(language_model), repeats=REPEATS)
    show(run_vision_language(config, output), Console())


if __name__ == "__main__":
    main()
