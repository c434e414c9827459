"""What was saved with a checkpoint of transformers to make its inputs: tokenizer, image processor, and their kin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from layerlens.integrations.audio_input import AudioInput, load_audio_input
from layerlens.integrations.auto_classes import has_towers, preprocessor
from layerlens.integrations.ctc_vocabulary import has_letters, tokenizer_of_letters
from layerlens.integrations.pretrained import ImageInput, mode_for, tokenizer_of
from layerlens.sources.source import LoadRequest

# Byte-level tokenizers that take a list of words only if they may put a space before each.
SPACE_BEFORE_WORDS = ("bloom", "gpt2", "roberta", "deberta", "longformer")
MOST_SHOWN = 60
"""Characters of a vocabulary that a message shows."""


@dataclass(frozen=True)
class Processors:
    """What makes inputs of a model, as its task has use for.

    Args:
        tokenizer, images, audio, processor, no_processor: see ``PretrainedModel``.
        notes: what the user should know of them, a line each.
    """

    tokenizer: Any = None
    images: ImageInput | None = None
    audio: AudioInput | None = None
    processor: Any = None
    no_processor: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Vocabulary:
    """What a head of letters has outputs for.

    Args:
        tokenizer: of transcripts; None where the checkpoint has none and none is made.
        head: what the configuration of the model is to say of a new head; empty where the checkpoint's own stays.
        letters: of the data, that the manifest must have for the same vocabulary to be made again.
        notes: what the user should know, a line each.
    """

    tokenizer: Any = None
    head: Mapping[str, Any] = field(default_factory=dict)
    letters: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


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
        audio = load_audio_input(path, told)
        if request.kind.vocabulary_head:
            found = vocabulary_of(request, path, config, told)
            return Processors(found.tokenizer, audio=audio, notes=found.notes)
        return Processors(_tokenizer(path, told) if request.kind.tokens else None, audio=audio)
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


def vocabulary_of(request: LoadRequest, path: str, config: Any, told: dict[str, Any]) -> Vocabulary:
    """The vocabulary of a model that writes letters, and what its head is to be.

    A trained head stays with its tokenizer, unless a new one is wanted. A new head has an output for each token of the
    checkpoint's tokenizer. Where there is none, or a new head is wanted and the tokenizer lacks letters of the data,
    the vocabulary is made of the letters of the data.
    """
    tokenizer, letters = _tokenizer(path, told), tuple(request.labels)
    trained = any(str(name).endswith(request.kind.endings) for name in getattr(config, "architectures", None) or ())
    anew = request.new_head or (request.new_head is None and bool(letters))
    if trained and not anew:
        return Vocabulary(tokenizer)
    notes: tuple[str, ...] = ()
    if letters and (tokenizer is None or (anew and not has_letters(tokenizer, letters))):
        tokenizer = tokenizer_of_letters(letters)
        shown = "".join(letters) if len(letters) <= MOST_SHOWN else f"{''.join(letters[:MOST_SHOWN])} ..."
        notes = (
            f"model: a vocabulary of {len(tokenizer)} tokens is made of the {len(letters)} characters of the "
            f"transcripts ({shown}), and the new head has an output for each",
        )
    elif not trained:
        letters = ()
    if tokenizer is None:
        return Vocabulary()
    return Vocabulary(tokenizer, {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}, letters, notes)


def image_processor(path: str, config: Any, told: dict[str, Any]) -> ImageInput:
    """The way from images to the pixels of a checkpoint.

    Raises:
        ModelNotFoundError: it has no image processor.
    """
    processor = preprocessor("AutoImageProcessor", "image processor", path, told)

    def transform(images: Sequence[Any]) -> Any:
        return processor(list(images), return_tensors="pt")["pixel_values"]

    return ImageInput(transform, "pixel_values", mode_for(getattr(config, "num_channels", 3)), processor)
