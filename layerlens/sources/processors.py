"""What was saved with a checkpoint of transformers to make its inputs: tokenizer, image processor, and their kin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from layerlens.integrations.audio_input import AudioInput, load_audio_input
from layerlens.integrations.auto_classes import has_towers, preprocessor
from layerlens.integrations.pretrained import ImageInput, mode_for, tokenizer_of
from layerlens.sources.source import LoadRequest

# Byte-level tokenizers that take a list of words only if they may put a space before each.
SPACE_BEFORE_WORDS = ("bloom", "gpt2", "roberta", "deberta", "longformer")


@dataclass(frozen=True)
class Processors:
    """What makes inputs of a model, as its task has use for.

    Args:
        tokenizer, images, audio, processor, no_processor: see ``PretrainedModel``.
    """

    tokenizer: Any = None
    images: ImageInput | None = None
    audio: AudioInput | None = None
    processor: Any = None
    no_processor: str = ""


def processors_of(request: LoadRequest, path: str, config: Any, told: dict[str, Any]) -> Processors:
    """What was saved with the model.

    Raises:
        ModelNotFoundError: the task needs one that is not there.
    """
    from transformers import AutoProcessor, AutoTokenizer

    reason = ""
    if request.kind.inputs == "image":
        tokenizer = _tokenizer(path, told) if request.kind.tokens else None
        return Processors(tokenizer, image_processor(path, config, told))
    if request.kind.inputs == "audio":
        return Processors(_tokenizer(path, told) if request.kind.tokens else None, audio=load_audio_input(path, told))
    if has_towers(request.kind.auto_class, config):
        try:
            processor = AutoProcessor.from_pretrained(path, **told)
            if hasattr(processor, "image_processor") and getattr(processor, "tokenizer", None) is not None:
                return Processors(tokenizer_of(processor), processor=processor)
        except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]  # said where the data has images
    spaced = request.kind.inputs == "words" and getattr(config, "model_type", "") in SPACE_BEFORE_WORDS
    settings = {"add_prefix_space": True} if spaced else {}
    tokenizer = tokenizer_of(AutoTokenizer.from_pretrained(path, **told, **settings))
    return Processors(tokenizer, no_processor=reason)


def _tokenizer(path: str, told: dict[str, Any]) -> Any:
    """The tokenizer of transcripts or captions; None where the checkpoint has none, which its task says."""
    from transformers import AutoTokenizer

    try:
        return tokenizer_of(AutoTokenizer.from_pretrained(path, **told))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def vocabulary_of(request: LoadRequest, path: str, config: Any, told: dict[str, Any]) -> dict[str, Any]:
    """What a new head of tokens is to be: an output for each token of the checkpoint's tokenizer.

    Nothing where the checkpoint has such a head already and no new one is wanted.
    """
    trained = any(str(name).endswith(request.kind.endings) for name in getattr(config, "architectures", None) or ())
    if not request.kind.vocabulary_head or (trained and not request.new_head):
        return {}
    tokenizer = _tokenizer(path, told)
    if tokenizer is None:
        return {}
    return {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}


def image_processor(path: str, config: Any, told: dict[str, Any]) -> ImageInput:
    """The way from images to the pixels of a checkpoint.

    Raises:
        ModelNotFoundError: it has no image processor.
    """
    processor = preprocessor("AutoImageProcessor", "image processor", path, told)

    def transform(images: Sequence[Any]) -> Any:
        return processor(list(images), return_tensors="pt")["pixel_values"]

    return ImageInput(transform, "pixel_values", mode_for(getattr(config, "num_channels", 3)), processor)
