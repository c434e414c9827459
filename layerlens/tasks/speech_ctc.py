"""Speech recognition by connectionist temporal classification (Graves et al. 2006): for each frame a letter or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.data.table import Table
from layerlens.exceptions import ConfigurationError
from layerlens.integrations.audio_input import positions_of
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.tasks.audio_samples import CLIP, leave_out, sound_inputs, way_in, with_sounds
from layerlens.tasks.batches import LENGTH, Batch, Features, Inputs
from layerlens.tasks.losses import IGNORED, logits_of
from layerlens.tasks.metrics import TARGETS, Decode, Judged, Metrics, Record, mean_loss
from layerlens.tasks.task import Task
from layerlens.tasks.text import padded_labels
from layerlens.tasks.transcripts import (
    CHARACTERS,
    claim_transcripts,
    composed,
    decoded,
    finish_texts,
    in_letters,
    letters_of,
    read_transcripts,
    record_texts,
)

if TYPE_CHECKING:
    import torch


OF_CHARACTERS = "Wav2Vec2CTCTokenizer"
"""The tokenizer of transformers with a token for each character; others have rules of their own."""


@dataclass(frozen=True)
class CtcTargets:
    """Transcripts of a batch.

    Args:
        labels: int64 [b, t], tokens of each transcript, ``IGNORED`` behind its end.
        frames: int64 [b], positions of the model that each clip has, without those of padding.
        blank: the token of a frame without a letter.
        zero_infinity: whether a transcript that does not fit counts as 0, as the model's configuration says.
        tokenizer: writes tokens as text.
    """

    labels: torch.Tensor
    frames: torch.Tensor
    blank: int
    zero_infinity: bool = False
    tokenizer: Any = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def each_tensor(self, change: Callable[[torch.Tensor], torch.Tensor], order: Any = None) -> CtcTargets:
        """The same with every tensor changed."""
        return replace(self, labels=change(self.labels), frames=change(self.frames))


def read(table: Table, config: DataConfig) -> Dataset:
    """Clips and their transcripts, with the letters of these."""
    found = read_transcripts(table, config)
    return replace(found, letters=letters_of(found.labels))


def encode(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Clips that are still encoded, with the tokens of their transcripts; those that do not fit are left out.

    Raises:
        ConfigurationError: there is no tokenizer, or it has tokens that the model has no output for.
    """
    tokenizer, model = pretrained.tokenizer, pretrained.model
    if tokenizer is None:
        raise ConfigurationError(
            "model.name_or_path: speech-ctc needs a tokenizer with the letters of the transcripts, and the model has a "
            "trained head without one; save the one that it was trained with beside the weights (vocab.json): "
            "Wav2Vec2CTCTokenizer('vocab.json').save_pretrained(DIRECTORY), or set model.new_head: true for a "
            "vocabulary and a head made of the letters of the data"
        )
    audio, blank = way_in(pretrained, TASK.name), blank_of(pretrained)
    said: dict[str, None] = {}
    texts = [composed(text) for text in dataset.labels] if pretrained.labels else list(dataset.labels)
    if any(kind.__name__ == OF_CHARACTERS for kind in type(tokenizer).__mro__):
        vocabulary, own_case = set(tokenizer.get_vocab()), bool(getattr(tokenizer, "do_lower_case", False))
        letters = {one for token in vocabulary - set(tokenizer.all_special_tokens) for one in token}
        texts = in_letters(
            texts, lambda one: (one.upper() if own_case else one) in letters, said, changes_case=not own_case
        )
    tokens = [tokenizer(text)["input_ids"] for text in texts]
    _check_outputs(pretrained, tokens)
    found = with_sounds(pretrained, dataset, config, TASK.name, tokens, cut=False)
    found.said |= said
    kept, left_out = [], dict[str, list[str]]()
    for one in found:
        ids = one["labels"]
        needed = len(ids) + sum(a == b for a, b in pairwise(ids))
        frames = positions_of(audio, model, one[LENGTH])
        if not decoded(tokenizer, ids).strip():
            left_out.setdefault("without a letter of the vocabulary in the transcript", []).append(one[CLIP].name)
        elif frames < needed:
            left_out.setdefault("too short for the transcript: fewer frames than letters", []).append(one[CLIP].name)
        else:
            kept.append(one | {"frames": frames, "blank": blank})
    found[:] = kept
    leave_out(found, left_out)
    return found


def blank_of(pretrained: PretrainedModel) -> int:
    """The token of a frame without a letter: transformers takes the padding token."""
    own = getattr(getattr(pretrained.model, "config", None), "pad_token_id", None)
    return int(pretrained.tokenizer.pad_token_id or 0) if own is None else int(own)


def _check_outputs(pretrained: PretrainedModel, tokens: Sequence[Sequence[int]]) -> None:
    outputs = getattr(getattr(pretrained.model, "config", None), "vocab_size", None)
    largest = max((max(one, default=0) for one in tokens), default=0)
    if outputs is not None and largest >= outputs:
        token = pretrained.tokenizer.convert_ids_to_tokens(largest)
        raise ConfigurationError(
            f"model.name_or_path: the transcripts have token {largest} ({token!r}), and the model has {outputs} "
            "outputs; give the tokenizer that the model was trained with, or set model.new_head: true for a new one"
        )


def collate(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, Any]:
    """Waves or spectrograms by the model's own argument, and ``CtcTargets``."""
    import torch

    config = getattr(pretrained.model, "config", None)
    labels = padded_labels(rows, max(len(row["labels"]) for row in rows), "right")
    frames = torch.tensor([row["frames"] for row in rows])
    infinite = bool(getattr(config, "ctc_zero_infinity", False))
    return sound_inputs(pretrained, rows), CtcTargets(labels, frames, rows[0]["blank"], infinite, pretrained.tokenizer)


def loss(output: Any, batch: Batch) -> torch.Tensor:
    """Negative log-likelihood of each transcript by its tokens, [b], as torch's ``ctc_loss`` reduces it by "mean"."""
    import torch

    targets: CtcTargets = batch.labels
    logits__btc = logits_of(output)
    kept = targets.labels != IGNORED
    lengths = kept.sum(1)
    frames = targets.frames.clamp(max=logits__btc.shape[1])
    losses: torch.Tensor = torch.nn.functional.ctc_loss(
        logits__btc.log_softmax(-1).transpose(0, 1), targets.labels[kept], frames, lengths, blank=targets.blank,
        reduction="none", zero_infinity=targets.zero_infinity,
    )  # fmt: skip
    return losses / lengths.clamp(min=1)


def _read(logits__btc: torch.Tensor, targets: CtcTargets) -> tuple[list[str], list[str]]:
    """(what the clips' transcripts are, what the likeliest letter of each frame says, without repeats and blanks)."""
    predicted, actual = [], []
    best = logits__btc.argmax(-1).tolist()
    for ids, labels, frames in zip(best, targets.labels.tolist(), targets.frames.tolist(), strict=True):
        letters = [one for one, _ in groupby(ids[:frames]) if one != targets.blank]
        predicted.append(decoded(targets.tokenizer, letters))
        actual.append(decoded(targets.tokenizer, [one for one in labels if one != IGNORED]))
    return actual, predicted


def record(output: Any, batch: Judged, decode: Decode | None) -> Record:
    """Errors of what the likeliest letters say."""
    targets: Any = batch[TARGETS]
    return {**mean_loss(output, len(targets)), **record_texts(*_read(output.logits, targets))}


def right(output: Any, targets: CtcTargets) -> torch.Tensor:
    """Share of each transcript's characters that are among those read, in their order, [b]."""
    import torch

    pairs = zip(*_read(logits_of(output), targets), strict=True)
    errors = [record_texts([actual], [predicted])[CHARACTERS] for actual, predicted in pairs]
    return torch.tensor([max(0.0, 1.0 - float(wrong) / max(1.0, float(length))) for wrong, length in errors])


TASK = Task(
    name="speech-ctc",
    description="speech recognition by CTC: audio clips with transcripts, for wav2vec2, HuBERT and related models with "
    "the tokenizer of their processor (vocab.json), or one made of the letters of the transcripts; evaluated by word "
    "and character error rate",
    inputs="audio",
    read=read,
    claim=claim_transcripts,
    encode=encode,
    collate=collate,
    loss=loss,
    metrics=Metrics(record, finish_texts, ("wer",), lower=("wer", "cer")),
    auto_class="AutoModelForCTC",
    new_head=True,
    tokens=True,
    vocabulary_head=True,
    model_targets=(),
    right=right,
)
