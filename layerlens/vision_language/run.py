"""All images through all steps, timed, warm-up first; what fails for one image leaves the others alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from layerlens.config.vision_language import PipelineConfig
from layerlens.exceptions import DataError
from layerlens.models import Detection
from layerlens.utils.progress import Progress, silent
from layerlens.vision_language.generation import Generation, GenerationError, LanguageModel
from layerlens.vision_language.images import load_image
from layerlens.vision_language.prompt import build_messages, check_report, no_findings
from layerlens.vision_language.results import DONE, FAILED, Item, Outcome, Run

if TYPE_CHECKING:
    import torch
    from PIL import Image

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
        progress: called after every image and pass.
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


class Detector(Protocol):
    """A detector whose steps can be called apart; see ``integrations.ultralytics.YoloDetector``."""

    names: tuple[str, ...]

    def preprocess(self, image: Image.Image) -> torch.Tensor: ...

    def infer(self, batch: torch.Tensor) -> Any: ...

    def suppress(self, raw: Any, sizes: Sequence[tuple[int, int]]) -> list[list[Detection]]: ...

    def describe(self) -> dict[str, Any]: ...


@dataclass
class _Job:
    """One image on its way."""

    path: Path
    steps: dict[str, float] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    image: Image.Image | None = None
    tensor: torch.Tensor | None = None
    generation: Generation | None = None

    @property
    def going(self) -> bool:
        return "reason" not in self.fields

    def fail(self, step: str, error: BaseException) -> None:
        words = " ".join(str(error).split()) or type(error).__name__
        self.fields.update(failed_step=step, reason=words)


def run_batch(
    paths: Sequence[Path],
    detector: Detector,
    llm: LanguageModel,
    config: PipelineConfig,
    *,
    repeat: int = 0,
    warmup: bool = False,
) -> list[Outcome]:
    """Load, detect and report on ``paths``; the detector sees them at once, the language model one after the other.

    Args:
        paths: the images.
        detector, llm: the models.
        config: confidence, prompt, limits.
        repeat, warmup: noted in the timings.

    Returns:
        An outcome for each path. The steps and ``unattributed_ms`` of all add up to the wall time of the batch.
    """
    begun = time.perf_counter()
    jobs = [_Job(path) for path in paths]
    for job in jobs:
        with _timed([job], "load"):
            job.image = load_image(job.path, config.max_megapixels)
            job.fields["size"] = job.image.size
    for job in _going(jobs):
        with _timed([job], "preprocess"):
            assert job.image is not None
            job.tensor = detector.preprocess(job.image)
    _detect(_going(jobs), detector)
    for job in _going(jobs):
        _report(job, detector, llm, config)
    wall_ms = 1e3 * (time.perf_counter() - begun)
    rest = (wall_ms - sum(sum(job.steps.values()) for job in jobs)) / len(jobs)
    return [_outcome(job, rest, wall_ms, len(jobs), repeat, warmup) for job in jobs]


def _detect(jobs: Sequence[_Job], detector: Detector) -> None:
    if not jobs:
        return
    raw: Any = None
    with _timed(jobs, "detect"):
        import torch

        raw = detector.infer(torch.stack([job.tensor for job in jobs if job.tensor is not None]))
    if not jobs[0].going:  # it failed for all of them
        return
    with _timed(jobs, "nms"):
        found = detector.suppress(raw, [job.fields["size"] for job in jobs])
        for job, detections in zip(jobs, found, strict=True):
            job.fields["detections"] = tuple(detections)


def _report(job: _Job, detector: Detector, llm: LanguageModel, config: PipelineConfig) -> None:
    detections = job.fields["detections"]
    with _timed([job], "prompt"):
        if not detections:  # a language model that is asked about nothing would have to invent
            job.fields.update(report=no_findings(config.confidence), report_source="no detections")
            return
        messages = build_messages(detections, image=job.path.name, size=job.fields["size"], template=config.prompt)
        job.fields["messages"] = messages
    try:
        made = llm.generate(messages, config.max_new_tokens)
    except GenerationError as error:
        job.steps.update(error.steps_ms)
        job.fail("language model", error)
        job.fields.update(partial_report=error.partial_text or None, usage={"attempts": error.attempts})
        return
    job.steps.update(made.steps_ms)
    job.generation = made
    if not made.text:
        job.fail("language model", ValueError("the answer is empty"))
    with _timed([job], "check"):
        job.fields["check"] = check_report(made.text, detections, detector.names, job.fields["size"])
    job.fields.update(
        report=made.text or None,
        report_source="language model",
        usage={
            "prompt_tokens": made.prompt_tokens,
            "completion_tokens": made.completion_tokens,
            "finish_reason": made.finish_reason,
            "attempts": made.attempts,
            "failed_attempts": list(made.failures),
            "streamed": made.streamed,
        },
    )


def _outcome(job: _Job, rest: float, wall_ms: float, count: int, repeat: int, warmup: bool) -> Outcome:
    made = job.generation
    run = Run(
        repeat=repeat,
        warmup=warmup,
        steps_ms=job.steps,
        total_ms=sum(job.steps.values()) + rest,
        unattributed_ms=rest,
        batch_size=count,
        batch_ms=wall_ms,
        time_to_first_token_ms=made.time_to_first_token_ms if made else None,
        token_ms=made.token_ms if made else (),
        token_unit=made.token_unit if made else "token",
        communication=asdict(made.communication) if made else None,
    )
    return Outcome(status=DONE if job.going else FAILED, run=run, **job.fields)


def _going(jobs: Sequence[_Job]) -> list[_Job]:
    return [job for job in jobs if job.going]


@contextmanager
def _timed(jobs: Sequence[_Job], step: str) -> Iterator[None]:
    """Give every job its equal share of the block's wall time; what the block cannot do fails these jobs alone."""
    start = time.perf_counter()
    try:
        yield
    except (DataError, RuntimeError, MemoryError, ValueError) as error:  # torch reports most trouble as RuntimeError
        for job in jobs:
            job.fail(step, error)
    finally:
        share = 1e3 * (time.perf_counter() - start) / len(jobs)
        for job in jobs:
            job.steps[step] = share
