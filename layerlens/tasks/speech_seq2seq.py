"""Speech to text by an encoder of sound and a decoder of tokens: Whisper, Speech2Text and their kin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.exceptions import ConfigurationError
from layerlens.integrations.audio_input import encoder_widths
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.tasks.audio_samples import CLIP, leave_out, sound_inputs, with_sounds
from layerlens.tasks.batches import Batch, Features, Inputs
from layerlens.tasks.losses import IGNORED, token_loss
from layerlens.tasks.metrics import TARGETS, Decode, Judged, Metrics, Record, finish_tokens, record_tokens
from layerlens.tasks.seq2seq import decoder_inputs
from layerlens.tasks.task import Task
from layerlens.tasks.text import padded_labels
from layerlens.tasks.transcripts import WORDS, claim_transcripts, finish_texts, read_transcripts, record_texts

if TYPE_CHECKING:
    import torch

OF_SPEECH = ("Whisper", "Speech2Text", "Moonshine")
OF_DECODER = ("decoder_input_ids", "decoder_attention_mask")
GENERATED = "generated"
SPARE_TOKENS = 8
"""Tokens that a text may be longer than the longest transcript of its batch."""


def encode(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Clips that are still encoded, with the tokens of their transcripts.

    Raises:
        ConfigurationError: there is no tokenizer.
    """
    tokenizer = pretrained.tokenizer
    if tokenizer is None:
        raise ConfigurationError(
            "model.name_or_path: speech-seq2seq needs a tokenizer; save the processor of the model beside its weights"
        )
    _told_language(pretrained)
    tokens = [_without_start(pretrained, ids) for ids in tokenizer(text_target=list(dataset.labels))["input_ids"]]
    found = with_sounds(pretrained, dataset, config, TASK.name, tokens, cut=False)
    longest = _longest(pretrained, config)
    too_long = [one for one in found if len(one["labels"]) > longest]
    if too_long:
        why = f"of a transcript of more than {longest} tokens (data.max_target_length)"
        leave_out(found, {why: [one[CLIP].name for one in too_long]})
        found[:] = [one for one in found if len(one["labels"]) <= longest]
    return found


def _told_language(pretrained: PretrainedModel) -> None:
    """Whisper writes in the language, and does what, its tokenizer says; else it would guess both."""
    told: Any = getattr(pretrained.model, "generation_config", None)
    for name, table in (("language", "lang_to_id"), ("task", "task_to_id")):
        value = getattr(pretrained.tokenizer, name, None)
        if value and hasattr(told, table):
            setattr(told, name, value)


def _longest(pretrained: PretrainedModel, config: DataConfig) -> int:
    own = getattr(getattr(pretrained.model, "config", None), "max_target_positions", None)
    limit = config.max_target_length or own or config.max_length
    return min(limit, own - 1) if own else limit  # the decoder gets one token before them


def _without_start(pretrained: PretrainedModel, ids: Sequence[int]) -> list[int]:
    """Tokens without the one that the decoder starts with, which Whisper's tokenizer writes too."""
    start = getattr(getattr(pretrained.model, "config", None), "decoder_start_token_id", None)
    return list(ids[1:] if start is not None and len(ids) and ids[0] == start else ids)


def collate(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, torch.Tensor]:
    """Spectrograms or waves, and the labels shifted by one as the decoder's.

    The decoder gets another width than the encoder, so that no activation's tokens can be taken for the other's.
    """
    inputs = sound_inputs(pretrained, rows)
    widths, width = encoder_widths(pretrained.model, inputs), max(len(row["labels"]) for row in rows)
    while width in widths:
        width += 1
    labels = padded_labels(rows, width, "right")
    inputs["decoder_input_ids"] = decoder_inputs(pretrained.model, labels)
    inputs["decoder_attention_mask"] = (labels != IGNORED).long()
    return inputs, labels


def generated(model: Any, batch: Batch) -> Any:
    """Tokens [b, t] that the model writes by itself, the likeliest one each time; None where it has no ``generate``."""
    if not hasattr(model, "generate"):
        return None
    given = {name: value for name, value in batch.inputs.items() if name not in OF_DECODER}
    own = getattr(model.config, "max_target_positions", None)
    most = batch.labels.shape[1] + SPARE_TOKENS
    most = most if own is None else max(1, min(most, own - SPARE_TOKENS))
    with _without_advice():
        return model.generate(**given, max_new_tokens=most, do_sample=False, num_beams=1)


@contextmanager
def _without_advice() -> Iterator[None]:
    """While open, transformers says nothing of how it is asked to generate."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def record(output: Any, batch: Judged, decode: Decode | None) -> Record:
    """Right tokens where each is given those before it, and errors of what the model writes by itself."""
    labels = batch[TARGETS]
    found = record_tokens(output, {**batch, "labels": labels}, decode)
    written = getattr(output, GENERATED, None)
    if written is None or decode is None:
        return found
    actual = [decode([one for one in row if one != IGNORED]) for row in labels.tolist()]
    return {**found, **record_texts(actual, [decode(row) for row in written.tolist()])}


def finish(records: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> dict[str, float]:
    """Word and character error rate of what the model writes, perplexity and share of right tokens."""
    texts = [dict(record) for record in records if WORDS in record]
    rates = finish_texts(texts, labels) if len(texts) == len(records) else {}
    return {**rates, **finish_tokens([dict(record) for record in records], labels)}


TASK = Task(
    name="speech-seq2seq",
    description="speech recognition by an encoder and a decoder: audio clips with transcripts, for Whisper and "
    "Speech2Text with their processor; evaluated by word and character error rate of the generated text",
    inputs="audio",
    read=read_transcripts,
    claim=claim_transcripts,
    encode=encode,
    collate=collate,
    loss=token_loss,
    metrics=Metrics(record, finish, ("wer", "perplexity"), lower=("wer", "cer", "perplexity")),
    auto_class="AutoModelForSpeechSeq2Seq",
    class_endings=(*(f"{name}ForConditionalGeneration" for name in OF_SPEECH), "SpeechEncoderDecoderModel"),
    tokens=True,
    generate=generated,
    token_labels=True,
    model_targets=(),
)
