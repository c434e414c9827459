"""Image, detection, boxes, language model, report: the pipeline with the time of every step.

    images.py ─▶ Detector (integrations/ultralytics.py) ─▶ LanguageModel (generation.py) ─▶ results.py ─▶ page.py
                                                             │
                              local_model.py (transformers) ─┴─ server_model.py (OpenAI-compatible, over HTTP)

``prompt.py`` makes the chat from the boxes and holds the report against them, sentence by sentence (``claims.py``).
``run.py`` takes batches of images through all steps. Models are put together in ``layerlens.jobs.vision_language``.
Nothing here imports torch or transformers before it is needed, apart from ``local_model.py``.
"""

from layerlens.vision_language.generation import Communication, Generation, GenerationError, LanguageModel
from layerlens.vision_language.images import find_images, load_image
from layerlens.vision_language.results import Item, Outcome, Run
from layerlens.vision_language.run import Detector, Variant, run_batch, run_images
from layerlens.vision_language.server_model import ServerModel

__all__ = [
    "Communication",
    "Detector",
    "Generation",
    "GenerationError",
    "Item",
    "LanguageModel",
    "Outcome",
    "Run",
    "ServerModel",
    "Variant",
    "find_images",
    "load_image",
    "run_batch",
    "run_images",
]
