"""The whole detection-to-report job: find the models, run every image, write results, annotated images and report."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from layerlens import __version__
from layerlens.config.vision_language import PipelineConfig
from layerlens.exceptions import ConfigurationError, DataError, ModelNotFoundError
from layerlens.jobs.adapted_models import adapted_detector, adapted_language_model
from layerlens.utils.atomic import atomic_write_bytes, atomic_write_text, check_writable
from layerlens.utils.processor import processor_name
from layerlens.utils.progress import Progress, silent
from layerlens.utils.threads import set_threads
from layerlens.vision_language import Item, LanguageModel, ServerModel, Variant, find_images, load_image, run_images
from layerlens.vision_language.results import summarize
from layerlens.vision_language.run import ADAPTED, BASE, MERGED

SUMMARY_FILE, REPORT_FILE = "summary.json", "report.html"
FORMAT = 1


@dataclass
class VisionLanguageResult:
    """A finished job.

    Args:
        directory: the output directory.
        items: every image with all its passes.
        summary: what summary.json holds.
        files: summary, report, and the folders results and annotated.
        warnings: what the user should know, a line each.
    """

    directory: Path
    items: list[Item]
    summary: dict[str, Any]
    files: dict[str, Path] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def failed(self) -> list[Item]:
        """The images that could not be done."""
        return [item for item in self.items if item.failed]


def run_vision_language(
    config: PipelineConfig,
    directory: Path,
    *,
    base_dir: Path | None = None,
    progress: Progress = silent,
    warn: Callable[[str], None] = lambda line: None,
) -> VisionLanguageResult:
    """Detect and report on every image, timed, and write everything below ``directory``.

    An image's JSON and annotated picture are written as soon as it is done, outside of the timings: whatever happens
    to later images, it stays.

    Args:
        config: models, images, limits.
        directory: for results/NAME.json, annotated/NAME.png, summary.json and report.html.
        base_dir: where relative paths of the configuration start; the working directory when None.
        progress: reports warm-up and images.
        warn: called for every failed image and every wrong report.

    Raises:
        DataNotFoundError, DataError: no image is there, or none of them can be used.
        ModelNotFoundError, ModelSpecError: a model cannot be found or used.
        ConfigurationError: a setting contradicts another or the machine.
        OutputError: the directory cannot be written.
    """
    check_writable(directory)
    threads = set_threads(config.threads)
    paths = find_images(config.images, base_dir)
    started, load_before = time.time(), _load()
    variants = _variants(config, base_dir)
    names = _file_names(paths)
    pictures: dict[Path, Path] = {}
    primary = variants[1].name if len(variants) > 1 else BASE

    def finished(item: Item) -> None:
        atomic_write_text(directory / "results" / f"{names[item.path]}.json", _json(item_json(item, primary)))
        if item.path not in pictures:
            picture = _annotated(item, primary, variants, config)
            if picture is not None:
                target = directory / "annotated" / f"{names[item.path]}.png"
                pictures[item.path] = atomic_write_bytes(target, picture)
        if item.failed and all(passes[-1].run.repeat == config.repeats - 1 for passes in item.outcomes.values()):
            failure = _failure(item)
            warn(f"{item.path.name}: failed ({failure['step']}): {failure['reason']}")

    try:
        items = run_images(paths, variants, config, progress=progress, finished=finished)
    finally:
        for variant in variants:
            if isinstance(variant.llm, ServerModel):
                variant.llm.close()
    wrong = [item for item in items if (last := item.latest(primary)) is not None and last.is_wrong]
    if wrong:
        warn(
            f"{len(wrong)} of {len(items)} reports disagree with the boxes "
            f"({wrong[0].path.name}{' ...' if len(wrong) > 1 else ''}); see `check` in results/"
        )
    if all(_unusable(item) for item in items):
        first = next(outcome for passes in items[0].outcomes.values() for outcome in passes)
        raise DataError(f"images: none of {len(items)} can be used; {items[0].path}: {first.reason}")
    summary = {
        "format": FORMAT,
        "images": len(items),
        "failed": sum(item.failed for item in items),
        "failures": [_failure(item) for item in items if item.failed],
        "primary": primary,
        "models": {v.name: {"detector": v.detector.describe(), "llm": v.llm.describe()} for v in variants},
        "variants": [summarize(items, variant.name) for variant in variants],
        "configuration": config.model_dump(mode="json"),
        "environment": {**_environment(config, threads), "load_average": f"{load_before}, then {_load()}",
                        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started))},
    }  # fmt: skip
    from layerlens.vision_language.page import report_page

    files = {
        "summary": atomic_write_text(directory / SUMMARY_FILE, _json(summary)),
        "report": atomic_write_text(directory / REPORT_FILE, report_page(items, summary, pictures)),
        "results": directory / "results",
    }
    if pictures:
        files["annotated"] = directory / "annotated"
    return VisionLanguageResult(directory, items, summary, files)


def item_json(item: Item, primary: str) -> dict[str, Any]:
    """What results/NAME.json holds: the primary variant's findings and report on top, every variant's passes below."""
    latest = item.latest(primary)
    found = latest.detections if latest else None
    return {
        "format": FORMAT,
        "image": str(item.path),
        "status": "failed" if item.failed else "done",
        "reason": latest.reason if latest else None,
        "detections": None if found is None else [asdict(detection) for detection in found],
        "report": latest.report if latest else None,
        "variants": {
            name: {**_without_run(asdict(last)), "passes": [asdict(outcome.run) for outcome in outcomes]}
            for name, outcomes in item.outcomes.items()
            if (last := item.latest(name)) is not None
        },
    }


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _without_run(outcome: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in outcome.items() if key != "run"}


def _variants(config: PipelineConfig, base_dir: Path | None) -> list[Variant]:
    from layerlens.integrations.ultralytics import find_weights, load_detector, torch_device

    torch_device(config.device)
    weights = find_weights(config.detector, base_dir)
    settings: dict[str, Any] = {
        "image_size": config.image_size, "confidence": config.confidence, "iou": config.iou, "device": config.device,
    }  # fmt: skip
    detector = load_detector(weights, fuse=True, **settings)
    llm = _language_model(config, base_dir)
    variants = [Variant(BASE, detector, llm)]
    if config.llm_adapter is not None and isinstance(llm, ServerModel):
        raise ConfigurationError("llm_adapter: works with a local language model; a server must load it itself")
    if config.detector_adapter is None and config.llm_adapter is None:
        return variants
    for name, merge in ((ADAPTED, False), (MERGED, True)):
        changed_detector, changed_llm = detector, llm
        if config.detector_adapter is not None:
            folder = _folder(config.detector_adapter, base_dir, "detector_adapter")
            changed_detector = adapted_detector(load_detector(weights, **settings), folder, merge=merge)
        if config.llm_adapter is not None:
            folder = _folder(config.llm_adapter, base_dir, "llm_adapter")
            changed_llm = adapted_language_model(_language_model(config, base_dir), folder, merge=merge)
        variants.append(Variant(name, changed_detector, changed_llm))
    return variants


def _language_model(config: PipelineConfig, base_dir: Path | None) -> LanguageModel:
    if config.llm.startswith(("http://", "https://")):
        return ServerModel(
            config.llm, model=config.llm_model, api_key_env=config.api_key_env, timeout_s=config.timeout_s,
            retries=config.retries,
        )  # fmt: skip
    for name in ("llm_model", "api_key_env"):
        if getattr(config, name) is not None:
            raise ConfigurationError(f"{name}: is for servers; llm is the local model {config.llm!r}")
    from layerlens.sources import load_pretrained
    from layerlens.vision_language.local_model import LocalModel

    try:
        loaded = load_pretrained(config.llm, "causal-lm", [], base_dir=base_dir)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(str(error).replace("model.name_or_path", "llm")) from error
    described = getattr(loaded.model.config, "description", None)  # what a model says of itself in its config.json
    name = f"{config.llm}: {described}" if described else config.llm
    return LocalModel(loaded.model.to(config.device), loaded.tokenizer, name)


def _folder(name: str, base_dir: Path | None, key: str) -> Path:
    folder = (base_dir or Path()) / Path(name).expanduser()
    if not folder.is_dir():
        raise ModelNotFoundError(f"{key}: no folder at {folder}; give what `layerlens run` or PEFT has written")
    return folder


def _annotated(item: Item, primary: str, variants: list[Variant], config: PipelineConfig) -> bytes | None:
    """The annotated image as PNG; None where the detector did not get to it."""
    import io

    from layerlens.vision_language.images import annotate

    outcome = item.latest(primary)
    if outcome is None or outcome.detections is None:
        return None
    detector = next(variant.detector for variant in variants if variant.name == primary)
    buffer = io.BytesIO()
    annotate(load_image(item.path, config.max_megapixels), outcome.detections, detector.names).save(buffer, "PNG")
    return buffer.getvalue()


def _unusable(item: Item) -> bool:
    """The file itself was the trouble, in every pass."""
    return all(outcome.failed_step == "load" for passes in item.outcomes.values() for outcome in passes)


def _failure(item: Item) -> dict[str, Any]:
    """Where and why an image failed, in the first variant in which it did."""
    last = [item.latest(variant) for variant in item.outcomes]
    outcome = next(outcome for outcome in last if outcome is not None and outcome.reason is not None)
    return {"image": str(item.path), "step": outcome.failed_step, "reason": outcome.reason}


def _file_names(paths: list[Path]) -> dict[Path, str]:
    """A name for the results of each image: its stem, with a number where two would be the same."""
    taken: set[str] = set()
    names = {}
    for path in paths:
        name, number = path.stem, 2
        while name.lower() in taken:
            name, number = f"{path.stem}-{number}", number + 1
        taken.add(name.lower())
        names[path] = name
    return names


def _environment(config: PipelineConfig, threads: int) -> dict[str, Any]:
    import torch

    versions = {}
    for name in ("torch", "transformers", "ultralytics-opencv-headless", "ultralytics"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    device = torch.device(config.device)
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {
        "device": f"{config.device} ({chip})",
        "threads": threads,
        "cores": os.cpu_count(),
        "batch_size": config.batch_size,
        "repeats": config.repeats,
        "warm_up_passes": config.warmup,
        "layerlens": __version__,
        "python": platform.python_version(),
        **versions,
    }


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
