"""The vocabulary of a new head of letters, made as transformers' guides to CTC make it: a token for each character.

Four more tokens have their usual places: padding, which is the blank of CTC, the beginning and the end of a sentence,
and what is unknown. The space between words is ``|``.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerlens.integrations.pretrained import PretrainedModel

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
SPACE = "|"


def tokenizer_of_letters(letters: Sequence[str]) -> Any:
    """A ``Wav2Vec2CTCTokenizer`` of these characters."""
    from transformers import Wav2Vec2CTCTokenizer

    tokens = (*SPECIAL, SPACE, *(one for one in letters if one != SPACE))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vocab.json"
        file.write_text(json.dumps({token: place for place, token in enumerate(tokens)}), encoding="utf-8")
        return Wav2Vec2CTCTokenizer(file)


def has_letters(tokenizer: Any, letters: Sequence[str]) -> bool:
    """Whether a tokenizer can write all of these characters, all in small letters or all in capitals.

    One that is not of characters writes what it can by rules of its own.
    """
    known = set(tokenizer.get_vocab())
    if not any(kind.__name__ == "Wav2Vec2CTCTokenizer" for kind in type(tokenizer).__mro__):
        return True
    return any({way(one) for one in letters} <= known for way in (str, str.lower, str.upper))


def save_vocabulary(pretrained: PretrainedModel, directory: Path) -> dict[str, Path]:
    """Write the processor of a model whose vocabulary is of the data: no checkpoint has it. The files, by their names.

    ``AutoProcessor.from_pretrained`` reads the directory.
    """
    if not pretrained.labels or pretrained.audio is None or pretrained.tokenizer is None:
        return {}
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    extractor, tokenizer = pretrained.audio.extractor, pretrained.tokenizer
    before = set(directory.iterdir())
    kind = PROCESSOR_MAPPING.get(type(pretrained.model.config), None)
    parts = [extractor, tokenizer] if kind is None else [kind(extractor, tokenizer)]
    for part in parts:
        part.save_pretrained(directory)
    return {path.name: path for path in sorted(set(directory.iterdir()) - before)}
