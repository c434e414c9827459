"""Trains the small detector for drawn plates and prints its mean average precision on plates it has not seen.

    python scripts/train_demo_detector.py [--output detector.pt] [--seed 0]

Under a minute on an idle CPU core. Without --output it goes to LayerLens's cache, where `--detector builtin:plates`
and the demos find it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from layerlens.jobs.builtin_models import builtin_detector
from layerlens.utils.places import default_cache_dir
from layerlens.vision_language.demo_detector import HELD_OUT_PLATES, held_out_precision, train_demo_detector


def main() -> None:
    """Train, write, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where the checkpoint goes")
    parser.add_argument("--seed", type=int, default=0, help="of the plates, the weights and the order")
    arguments = parser.parse_args()
    start = time.perf_counter()
    if arguments.output is None:
        path = builtin_detector(default_cache_dir(), seed=arguments.seed)
    else:
        path = train_demo_detector(arguments.output, seed=arguments.seed)
    seconds = time.perf_counter() - start
    print(f"{path}: {seconds:.0f} s, {torch.get_num_threads()} threads (a few means that it was in the cache)")
    precision = held_out_precision(path)
    print(
        f"mAP50 {precision['map50']:.3f}, mAP50-95 {precision['map50_95']:.3f} on {HELD_OUT_PLATES} held-out plates "
        "(ultralytics' validator)"
    )


if __name__ == "__main__":
    main()
