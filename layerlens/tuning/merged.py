"""``layerlens export --merge``: one checkpoint with the LoRA in its weights, which plain transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ManifestError
from layerlens.integrations.ctc_vocabulary import save_vocabulary
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.integrations.transformers import embedding_rows
from layerlens.models import Manifest
from layerlens.sources import load_pretrained
from layerlens.tuning.base_model import check_weights, load_base
from layerlens.tuning.directory import load, rows_needed
from layerlens.tuning.inject import merge
from layerlens.tuning.serving import Origin, origin_of
from layerlens.utils.atomic import staged_directory

if TYPE_CHECKING:
    import torch

SHARD = "5GB"


def export_merged(
    place: Path, manifest: Manifest | None, model: str | None, output: Path, *, trust_remote_code: bool = False
) -> dict[str, Path]:
    """Write the base model with the LoRA of ``place`` added into its weights, and the trained task head in place.

    Args:
        place: a trained directory, a run's directory, or its manifest's file.
        manifest: the one that is there, if there is one.
        model: name or path of the base model, if it is not where the adapter says.
        output: directory, created if it is not there; the weights of an earlier export in it are replaced.
        trust_remote_code: whether Python code beside the base model's weights may run.

    Returns:
        The path of each file, by its name: safetensors of at most 5 GB in the base checkpoint's precision, config.json,
        the generation configuration of a model that generates, tokenizer or image processor.

    Raises:
        ManifestError: adapters or prefixes, which no weight can take up, or it is no transformers model.
        ModelNotFoundError: the base model cannot be found or read.
        OutputError: the directory cannot be written.
    """
    with origin_of(place, manifest, model) as origin:
        pretrained = _base(origin, model, trust_remote_code)
        base: Any = pretrained.model
        if not hasattr(base, "save_pretrained"):
            raise ManifestError(
                f"{type(base).__name__} is not a transformers model and has no known checkpoint format; merge it with "
                "layerlens.tuning.merge and save its state_dict"
            )
        folder = place if place.is_dir() else place.parent
        whole = folder if origin.directory in (folder, folder / "peft") else origin.directory
        merged: Any = merge(load(base, whole, check_fingerprint=False))
        dtype = checkpoint_dtype(pretrained.path)
        if dtype is not None and not getattr(merged, "is_quantized", False):
            merged = merged.to(dtype)  # once, after the sum: B·A is added in the precision of loading
        old = [path.name for path in output.glob("model*.safetensors*")] if output.is_dir() else []
        with staged_directory(output, owned=old) as staging:
            merged.save_pretrained(staging, max_shard_size=SHARD)
            _save_processor(pretrained, staging)
            names = sorted(path.name for path in staging.iterdir())
    return {name: output / name for name in names}


def checkpoint_dtype(path: str) -> torch.dtype | None:
    """The precision that a checkpoint says it is in; None where it does not."""
    import torch
    from transformers import PretrainedConfig

    try:
        said, _ = PretrainedConfig.get_config_dict(path, local_files_only=True)
    except (OSError, ValueError):
        return None
    inner = said.get("text_config") or {}
    name = said.get("dtype") or said.get("torch_dtype") or inner.get("dtype") or inner.get("torch_dtype")
    found = getattr(torch, str(name).removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else None


def _base(origin: Origin, model: str | None, trust_remote_code: bool) -> PretrainedModel:
    if origin.manifest is None:
        if not origin.base:
            raise ManifestError("the base model is not recorded here; pass --model MODEL")
        pretrained = load_pretrained(origin.base, origin.task, (), trust_remote_code=trust_remote_code)
        _resize(pretrained, origin.directory)
        return pretrained
    pretrained = load_base(origin.manifest, model, trust_remote_code=trust_remote_code)
    check_weights(pretrained.model, origin.manifest.model)
    return pretrained


def _resize(pretrained: PretrainedModel, directory: Path) -> None:
    """Give the base model the rows that the adapter has been trained with: as many as the tokenizer has tokens."""
    base, there = pretrained.model, embedding_rows(pretrained.model)
    needed = rows_needed(base, directory)
    if there is not None and needed > there:
        resizable: Any = base
        resizable.resize_token_embeddings(max(needed, len(pretrained.tokenizer or ())))


def _save_processor(pretrained: PretrainedModel, directory: Path) -> None:
    """As it is on disk: what loading adds to a tokenizer (padding by the end of text) is not saved."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer

    path, images = pretrained.path, pretrained.images
    if save_vocabulary(pretrained, directory):
        return
    kinds: list[Any] = [AutoTokenizer] if pretrained.tokenizer is not None else []
    if pretrained.processor is not None:
        kinds = [AutoProcessor]
    elif pretrained.audio is not None:
        kinds.append(AutoFeatureExtractor)
    elif (images is not None and images.processor is not None) or (Path(path) / "preprocessor_config.json").is_file():
        kinds.append(AutoImageProcessor)
    for kind in kinds:
        kind.from_pretrained(path, local_files_only=True).save_pretrained(directory)
