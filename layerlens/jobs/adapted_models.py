"""Tuned adapters put into the pipeline's models: beside the weights, or merged into them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ConfigurationError, ManifestError
from layerlens.tuning.export import MODULES_FILE, PEFT_DIRECTORY
from layerlens.utils.atomic import settle

if TYPE_CHECKING:
    from layerlens.integrations.ultralytics import YoloDetector

MANIFEST_FILE = "manifest.json"


def adapted_detector(detector: YoloDetector, folder: Path, *, merge: bool) -> YoloDetector:
    """``detector`` (not fused) with the LoRA layers of ``folder``; merged and then fused where ``merge``.

    Batch normalisation is fused into convolutions only where no LoRA layer stands between them. A detector that was
    tuned to other classes than its own gets the head that they were trained with.

    Raises:
        ManifestError: the folder has no adapter, or it does not fit.
    """
    from layerlens.integrations.ultralytics import fuse
    from layerlens.integrations.ultralytics_head import take_classes
    from layerlens.manifest import read_manifest

    peft, modules = _parts(folder)
    if modules is not None:
        raise ManifestError(f"detector_adapter: {modules} has adapters or prefixes, which detectors cannot take")
    if (folder / MANIFEST_FILE).is_file():
        labels = read_manifest(folder / MANIFEST_FILE).model.labels
        if labels and labels != detector.names:
            take_classes(detector.module, labels, 0)  # its weights are replaced by those of the adapter
            detector.names = labels
    detector.module = _with_peft(detector.module, peft, folder, merge=merge)
    if merge:
        fuse(detector)
    return detector


def adapted_language_model(llm: Any, folder: Path, *, merge: bool) -> Any:
    """``llm`` with everything that ``folder`` holds: LoRA through PEFT, adapters and prefixes through our modules.

    Merging adds LoRA to the weights; adapters and prefixes are no linear change of a weight and stay beside them.

    Raises:
        ManifestError: the folder has no adapter, or it does not fit.
        ConfigurationError: the model is not a local one.
    """
    from layerlens.tuning import load_modules

    if not hasattr(llm, "model"):
        raise ConfigurationError("llm_adapter: works with a local language model")
    peft, modules = _parts(folder)
    if peft is not None:
        llm.model = _with_peft(llm.model, peft, folder, merge=merge)
    elif (folder / MANIFEST_FILE).is_file():
        _check(llm.model, folder)
    if modules is not None:
        load_modules(llm.model, modules, trainable=False)
    llm.model.eval()
    return llm


def _parts(folder: Path) -> tuple[Path | None, Path | None]:
    """The PEFT directory and the file of LayerLens modules in ``folder``."""
    settle(folder)
    places = (folder, folder / PEFT_DIRECTORY)
    peft = next((place for place in places if (place / "adapter_config.json").is_file()), None)
    modules = folder / MODULES_FILE
    if peft is None and not modules.is_file():
        raise ManifestError(
            f"{folder}: no adapter_config.json, no {PEFT_DIRECTORY}/ and no {MODULES_FILE}; give a directory that "
            "`layerlens run`, `layerlens show --output` or PEFT's save_pretrained has written"
        )
    return peft, modules if modules.is_file() else None


def _with_peft(model: Any, peft: Path | None, folder: Path, *, merge: bool) -> Any:
    from peft import PeftModel

    from layerlens.integrations.peft_calls import take_keywords
    from layerlens.integrations.quantized_merge import merge_with_cost

    assert peft is not None
    if (folder / MANIFEST_FILE).is_file():
        _check(model, folder)
    try:
        tuned = take_keywords(PeftModel.from_pretrained(model, str(peft)))
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        raise ManifestError(
            f"{peft}: does not fit {type(model).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error
    tuned.requires_grad_(False).eval()
    return merge_with_cost(tuned, tuned.merge_and_unload) if merge else tuned.get_base_model()


def _check(model: Any, folder: Path) -> None:
    from layerlens.manifest import read_manifest
    from layerlens.tuning.base_model import check_names, check_weights

    manifest = read_manifest(folder / MANIFEST_FILE)
    check_names(model, manifest.choice)
    check_weights(model, manifest.model)
