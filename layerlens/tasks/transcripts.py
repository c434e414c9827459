"""Transcripts: which column has them, how they are written in the letters of a vocabulary, and error rates by jiwer."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.data.rows import FIRST
from layerlens.data.table import Table
from layerlens.exceptions import ConfigurationError
from layerlens.tasks.audio_samples import has_sounds, sound_column
from layerlens.tasks.metrics import Record
from layerlens.tasks.task import Claim

TRANSCRIPTS = (
    "transcription", "transcript", "sentence", "text", "normalized_text", "raw_transcription", "transcripts",
    "normalized_transcription", "utterance", "target",
)  # fmt: skip
MOST_SHOWN = 12
APOSTROPHES = "'’"
"""Marks inside words."""
WORDS, CHARACTERS = "words", "characters"


def read_transcripts(table: Table, config: DataConfig) -> Dataset:
    """Clips (paths or encoded bytes) and their transcripts."""
    column = table.find(config.text_column or config.label_column, "text_column", TRANSCRIPTS)
    return Dataset({"audio": table.sounds(config)}, table.texts(column), (), table.place)


def claim_transcripts(table: Table, config: DataConfig) -> Claim | None:
    """Clips of sound, and texts that do not repeat as classes do."""
    if not has_sounds(table, config):
        return None
    column = table.named(config.text_column or config.label_column, TRANSCRIPTS)
    if column is None:
        return None
    values = [value for value in table.peek(column)[:FIRST] if value is not None]
    texts = values and all(isinstance(value, str) for value in values)
    return Claim(3, f"{sound_column(table, config)} and transcripts in {column!r}") if texts else None


def composed(text: str) -> str:
    """The text with each letter and its accent as one character, where Unicode has one.

    >>> len("e\u0301"), len(composed("e\u0301"))
    (2, 1)
    """
    return unicodedata.normalize("NFC", text)


def letters_of(texts: Sequence[str]) -> tuple[str, ...]:
    """The characters of a vocabulary for these transcripts, in order: letters with their accents, digits, apostrophes.

    They are small letters, unless the transcripts have capitals alone. Other marks are not spoken.

    >>> letters_of(["It's 2!", "No"])
    ("'", '2', 'i', 'n', 'o', 's', 't')
    """
    whole = [composed(text) for text in texts]
    if any(one.islower() for text in whole for one in text):
        whole = [text.lower() for text in whole]
    characters = {one for text in whole for one in text}
    return tuple(sorted(one for one in characters if one in APOSTROPHES or unicodedata.category(one)[0] in "LMN"))


def in_letters(
    texts: Sequence[str], known: Callable[[str], bool], said: dict[str, None], *, changes_case: bool = True
) -> list[str]:
    """Transcripts as a vocabulary of single characters can write them, and in ``said`` what was done to them.

    All of them are in capitals, or in small letters, where more of their characters are known then. Marks that are
    unknown (no letters or digits) are taken out. Letters and digits that are unknown stay, as the unknown token.

    Args:
        texts: as the data have them.
        known: whether the vocabulary has a character.
        said: gets a line for each change.
        changes_case: False where the tokenizer changes the case itself.
    """
    ways: dict[str, Callable[[str], str]] = {"as they are": str}
    if changes_case:
        ways |= {"in capitals": str.upper, "in small letters": str.lower}
    unknown = {
        name: Counter(one for text in texts for one in way(text) if not one.isspace() and not known(one))
        for name, way in ways.items()
    }
    best = min(ways, key=lambda name: unknown[name].total())
    if best != "as they are":
        said[f"transcripts are written {best}, the case of the vocabulary"] = None
    lacking = unknown[best]
    marks = {one: n for one, n in lacking.items() if not one.isalnum()}
    letters = {one: n for one, n in lacking.items() if one.isalnum()}
    if marks:
        said[f"punctuation that the vocabulary lacks is removed from the transcripts: {_listed(marks)}"] = None
    if letters:
        said[
            f"letters that the vocabulary lacks become the unknown token: {_listed(letters)}; write the transcripts "
            "without them, or give a tokenizer that has them"
        ] = None
    gone = {ord(one): " " if one in "-–—/" else None for one in marks}
    return [" ".join(ways[best](text).translate(gone).split()) for text in texts]


def _listed(characters: dict[str, int]) -> str:
    ordered = sorted(characters.items(), key=lambda one: (-one[1], one[0]))
    more = f" and {len(ordered) - MOST_SHOWN} more" if len(ordered) > MOST_SHOWN else ""
    return ", ".join(f"{one!r} ({n:,})" for one, n in ordered[:MOST_SHOWN]) + more


def record_texts(actual: Sequence[str], predicted: Sequence[str]) -> Record:
    """Errors and length of transcripts, in words and in characters."""
    try:
        import jiwer
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "metrics: error rates of transcripts need jiwer; run: pip install 'layerlens[audio]'"
        ) from error
    pairs = [(one, other) for one, other in zip(actual, predicted, strict=True) if one.strip()]
    if not pairs:
        return {WORDS: np.zeros(2), CHARACTERS: np.zeros(2)}
    references, hypotheses = (list(part) for part in zip(*pairs, strict=True))
    compared: dict[str, Any] = {
        WORDS: jiwer.process_words(references, hypotheses),
        CHARACTERS: jiwer.process_characters(references, hypotheses),
    }
    found = {}
    for name, one in compared.items():
        wrong, right = one.substitutions + one.deletions, one.hits
        found[name] = np.array([wrong + one.insertions, wrong + right])
    return found


def finish_texts(records: Sequence[Record], labels: Sequence[str]) -> dict[str, float]:
    """Word error rate and character error rate of all transcripts together."""
    found = {}
    for metric, key in (("wer", WORDS), ("cer", CHARACTERS)):
        errors, length = np.sum([record[key] for record in records], axis=0)
        found[metric] = float(errors / max(1.0, length))
    return found


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of tokens, repeated ones and unknown ones too: tokenizers of CTC would leave out repeats."""
    grouping = "group_tokens" in getattr(getattr(type(tokenizer), "_decode", None), "__annotations__", {})
    text: str = tokenizer.decode(list(ids), **({"group_tokens": False} if grouping else {}))
    return text
