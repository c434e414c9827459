"""All images, all variants, warm-up first: the loop of the detection-to-report pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from layerlens.config.vision_language import PipelineConfig
from layerlens.utils.progress import Progress, silent
from layerlens.vision_language.batch import Detector, run_batch
from layerlens.vision_language.generation import LanguageModel
from layerlens.vision_language.results import Item

WARMUP_TRIES = 3
BASE, ADAPTED, MERGED = "base", "adapted", "merged"


@dataclass(frozen=True)
class Variant:
    """One pair of models.

    Args:
        name: "base", "adapted" (with its adapters beside the weights) or "merged" (adapters added to the weights).
        detector, llm: the models.
    """

    name: str
    detector: Detector
    llm: LanguageModel


def run_images(
    paths: Sequence[Path],
    variants: Sequence[Variant],
    config: PipelineConfig,
    *,
    progress: Progress = silent,
    finished: Callable[[Item], None] = lambda item: None,
) -> list[Item]:
    """Run every image through every variant ``config.repeats`` times, after ``config.warmup`` passes of one batch.

    The warm-up takes the first batch that has a usable image with a finding, among the first few.
    Within a repeat the variants take turns, so that what else the machine does falls on all of them alike.

    Args:
        paths: the images.
        variants: at least one.
        config: see there.
        progress: told of every image and pass.
        finished: called with an image when a repeat has done it in all variants; outside of the timings.

    Returns:
        An item for each path, in order.
    """
    items = [Item(path) for path in paths]
    batches = [items[start : start + config.batch_size] for start in range(0, len(items), config.batch_size)]
    if config.warmup:
        with progress.stage("Warming up", total=config.warmup * len(variants)) as advance:
            for variant in variants:
                batch = _warm_up(batches, variant, config)
                advance(1)
                for repeat in range(1, config.warmup):
                    _run(batch, variant, config, repeat, warmup=True)
                    advance(1)
    with progress.stage("Detecting and reporting", total=config.repeats * len(variants) * len(items)) as advance:
        for repeat in range(config.repeats):
            for batch in batches:
                for variant in variants:
                    _run(batch, variant, config, repeat, warmup=False)
                    advance(len(batch))
                for item in batch:
                    finished(item)
    return items


def _warm_up(batches: Sequence[Sequence[Item]], variant: Variant, config: PipelineConfig) -> Sequence[Item]:
    """The first warm-up pass; returns the batch that was good for it, with its outcomes noted."""
    for batch in batches[:WARMUP_TRIES]:
        _run(batch, variant, config, 0, warmup=True)
        if any(item.outcomes[variant.name][-1].run.time_to_first_token_ms is not None for item in batch):
            return batch
        for item in batch:  # not a warm-up: one of the models was not needed
            item.outcomes[variant.name].pop()
    batch = batches[0]
    _run(batch, variant, config, 0, warmup=True)
    return batch


def _run(batch: Sequence[Item], variant: Variant, config: PipelineConfig, repeat: int, *, warmup: bool) -> None:
    outcomes = run_batch(
        [item.path for item in batch], variant.detector, variant.llm, config, repeat=repeat, warmup=warmup
    )
    for item, outcome in zip(batch, outcomes, strict=True):
        item.outcomes.setdefault(variant.name, []).append(outcome)
