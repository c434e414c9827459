"""A YOLO detector, profiled with its own loss, adapted within a budget, tuned, and timed before and after.

    python demos/demo_yolo.py [OUTPUT]

Needs `pip install 'layerlens[vision]'` and no hub: the detector (ultralytics' blocks, 0.24 M parameters) is trained
here the first time, on plates drawn from a seed, and kept in the cache. Then the film changes: the same kind of
plates as negatives. LayerLens chooses LoRA ranks for the convolutions, a short training fits them, and the pipeline
shows what detection costs with the adapters beside the weights and merged into them.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from toys.detector import cached_detector
from toys.detector_training import mean_average_precision, save_checkpoint
from toys.language_model import cached_language_model
from toys.plates import CLASSES, draw_plates, write_dataset

from layerlens.cli.progress import shown_progress
from layerlens.config import RunConfig
from layerlens.config.vision_language import PipelineConfig
from layerlens.data import load_dataset
from layerlens.jobs.vision_language import run_vision_language
from layerlens.models import LabelledImage
from layerlens.pipeline import run_config
from layerlens.sources import load_pretrained
from layerlens.tasks import TASKS, make_batches
from layerlens.tuning import apply
from layerlens.utils.places import default_cache_dir

SIDE, EPOCHS, LEARNING_RATE = 128, 4, 4e-3
BUDGET = 6000
NEGATIVES, JUDGED = 200, 60
"""Plates to tune on, and held-out ones."""


def negatives(count: int, seed: int) -> list[LabelledImage]:
    """Drawn plates, dark and bright exchanged."""
    return [LabelledImage(255 - plate.pixels, plate.labels, plate.boxes) for plate in draw_plates(count, seed)]


def main() -> None:
    """Run the demonstration."""
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "out" / "yolo"
    shutil.rmtree(output, ignore_errors=True)
    torch.set_num_threads(1)
    with shown_progress(Console(stderr=True)) as progress:
        weights = cached_detector(default_cache_dir(), progress=progress)
        language_model = cached_language_model(default_cache_dir(), progress=progress)
    test, held_out = negatives(JUDGED, 10_001), draw_plates(JUDGED, 10_001)
    print(f"Detector: {weights} (ultralytics, AGPL-3.0)")
    print(f"  mAP50 on {JUDGED} held-out plates      {mean_average_precision(weights, CLASSES, held_out)['map50']:.3f}")
    print(f"  mAP50 on the same as negatives   {mean_average_precision(weights, CLASSES, test)['map50']:.3f}")

    data = write_dataset(output / "data", negatives(NEGATIVES, 30_003))
    config = RunConfig.model_validate(
        {
            "model": {"name_or_path": f"ultralytics:{weights}", "task": "object-detection"},
            "data": {"source": str(data.resolve()), "calibration_samples": 64, "batch_size": 16},
            "optimization": {"max_trainable_params": BUDGET, "methods": ["lora"], "lora_ranks": [1, 2, 4, 8]},
            "runtime": {"threads": 1},
            "output": {"directory": str((output / "chosen").resolve())},
        }
    )
    chosen = run_config(config, base_dir=output)
    adapted = [row for row in chosen.manifest.allocations if row.method != "none"]
    print(
        f"Chosen: LoRA on {len(adapted)} of {len(chosen.manifest.allocations)} convolutions, "
        f"{sum(row.cost for row in adapted):,} trainable parameters (budget {BUDGET:,}), "
        f"gap {chosen.manifest.gap:.1e}\n"
        f"  step 0 changes no output (largest change {chosen.measured['step_zero_max_abs_delta']:g})"
    )

    task = TASKS["object-detection"]
    pretrained = load_pretrained(config.model.reference, "object-detection", [])

    dataset = load_dataset(config.data, output, "object-detection")
    batches = make_batches(task, pretrained, dataset, config.data, batch_size=16)
    tuned = apply(pretrained.model, chosen.manifest)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=LEARNING_RATE)
    random = np.random.default_rng(0)
    for epoch in range(EPOCHS):
        losses = []
        for place in random.permutation(len(batches)):
            batch = batches[int(place)]
            loss = task.loss(tuned(**batch.inputs), batch).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        print(f"  epoch {epoch + 1}: detection loss {np.mean(losses):.3f}")
    tuned_folder = output / "tuned"
    tuned.save_pretrained(tuned_folder / "peft")
    shutil.copy(chosen.files["manifest_json"], tuned_folder)
    merged = save_checkpoint(tuned.merge_and_unload(), output / "tuned.pt", SIDE)
    print(f"  mAP50 on the negatives, tuned    {mean_average_precision(merged, CLASSES, test)['map50']:.3f}")

    (output / "images").mkdir()
    for index, plate in enumerate(test[:4]):
        Image.fromarray(plate.pixels).save(output / "images" / f"negative{index}.png")
    result = run_vision_language(
        PipelineConfig(
            images=(str(output / "images"),), detector=str(weights), detector_adapter=str(tuned_folder),
            llm=str(language_model), repeats=3, threads=1,
        ),
        output / "report",
    )  # fmt: skip
    print("Detector inference per image, 1 thread (median):")
    for variant in result.summary["variants"]:
        ms = variant["steady"]["steps_ms"]["detect"]["p50"]
        print(f"  {variant['variant']:8} {ms:6.2f} ms, {variant['detections']} findings on {variant['images']} images")
    print(f"Report: {result.files['report']}\nYOLO('{merged}') loads the tuned detector without LayerLens.")


if __name__ == "__main__":
    main()
