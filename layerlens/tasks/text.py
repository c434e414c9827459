"""Texts as token ids: one encoder for each kind of text task, and how their samples are padded to a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from layerlens.config import DataConfig
from layerlens.data import Dataset
from layerlens.exceptions import ConfigurationError, DataError
from layerlens.integrations.transformers import PretrainedModel
from layerlens.tasks.batches import Features, Inputs
from layerlens.tasks.losses import IGNORED

MASKED, RANDOM = 0.8, 0.1
"""Of the tokens to be found: share that the mask token replaces, and share that a random token does (BERT)."""


def encode_texts(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Single texts or pairs, with the sample's label beside them."""
    encoded = _tokenized(pretrained, dataset, config)
    return [one | {"labels": label} for one, label in zip(encoded, dataset.labels, strict=True)]


def encode_next_tokens(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Texts that are their own targets: the labels are the tokens, except padding (see ``next_token_labels``)."""
    return [one | {"labels": list(one["input_ids"])} for one in _tokenized(pretrained, dataset, config)]


def encode_masked_tokens(
    pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int
) -> list[Features]:
    """Texts in which some tokens have to be found (Devlin et al. 2019): ``data.mlm_probability`` of the tokens that are
    not special, at least one; of those 80 % become the mask token, 10 % a random one, 10 % stay.

    Which they are depends on ``seed`` and on the sample's tokens alone.

    Raises:
        ConfigurationError: the tokenizer has no mask token.
    """
    tokenizer = pretrained.tokenizer
    if tokenizer.mask_token_id is None:
        raise ConfigurationError(
            f"model.task: masked-lm needs a tokenizer with a mask token, {type(tokenizer).__name__} of "
            f"{pretrained.path} has none; use causal-lm"
        )
    special = set(tokenizer.all_special_ids)
    found = []
    for one in _tokenized(pretrained, dataset, config):
        ids = np.array(one["input_ids"])
        candidates = np.flatnonzero([token not in special for token in one["input_ids"]])
        content = hashlib.sha256(f"{seed}:{one['input_ids']}".encode()).digest()
        draw = np.random.default_rng(int.from_bytes(content[:8], "big"))
        count = min(len(candidates), max(1, round(config.mlm_probability * len(candidates))))
        chosen = np.sort(draw.permutation(candidates)[:count])
        labels = np.full(len(ids), IGNORED)
        labels[chosen] = ids[chosen]
        what, random = draw.random(count), draw.integers(0, len(tokenizer), count)
        ids[chosen[what < MASKED]] = tokenizer.mask_token_id
        swapped = (what >= MASKED) & (what < MASKED + RANDOM)
        ids[chosen[swapped]] = random[swapped]
        found.append(one | {"input_ids": ids.tolist(), "labels": labels.tolist()})
    return found


def encode_words(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Lists of words with a tag each; the tag goes to the first token of its word, the others have no loss."""
    tokenizer = _fast(pretrained, "token-classification")
    words = [list(sample) for sample in dataset.columns["words"]]
    encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=config.max_length)
    found = []
    for sample, (one, tags) in enumerate(zip(_samples(encoded), dataset.labels, strict=True)):
        labels, previous = [], None
        for word in encoded.word_ids(sample):
            labels.append(tags[word] if word is not None and word != previous else IGNORED)
            previous = word
        found.append(one | {"labels": labels})
    return found


def encode_sequences(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Source texts, each with the tokens of its target text as labels."""
    tokenizer = pretrained.tokenizer
    encoded = _tokenized(pretrained, dataset, config)
    longest = config.max_target_length or config.max_length
    targets = tokenizer(text_target=list(dataset.labels), truncation=True, max_length=longest)["input_ids"]
    return [one | {"labels": labels} for one, labels in zip(encoded, targets, strict=True)]


def encode_questions(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Question and context, with the first and last token of the answer as labels (Rajpurkar et al. 2016).

    A context that is longer than ``data.max_length`` is cut into windows that overlap by half, and the first window
    that has the whole answer is taken; questions without an answer point at the first token.

    Raises:
        DataError: no window has the whole of an answer, or a question is as long as a whole sequence.
    """
    tokenizer = _fast(pretrained, "question-answering")
    found = []
    texts, contexts = dataset.columns["text"], dataset.columns["pair"]
    for number, (question, context, answers) in enumerate(zip(texts, contexts, dataset.labels, strict=True), start=1):
        room = config.max_length - len(tokenizer(question, "")["input_ids"])
        if room < 1:
            raise DataError(
                f"data.max_length: sample {number}'s question leaves no room for its context in {config.max_length} "
                f"tokens; raise it: {question[:60]!r}"
            )
        windows = tokenizer(
            question, context, truncation="only_second", max_length=config.max_length, stride=room // 2,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        start, text = answers[0] if answers else (0, "")
        spans = [_span(windows, window, start, start + len(text)) for window in range(len(windows["input_ids"]))]
        chosen = next((window for window, span in enumerate(spans) if span is not None), None)
        if chosen is None:
            raise DataError(
                f"data.max_length: the answer {text[:60]!r} of sample {number} is longer than half of what "
                f"{config.max_length} tokens leave for the context; raise it"
            )
        names = [name for name in tokenizer.model_input_names if name in windows]
        found.append({name: windows[name][chosen] for name in names} | {"labels": list(spans[chosen] or (0, 0))})
    return found


def collate_texts(label_dtype: torch.dtype) -> Callable[[PretrainedModel, Sequence[Features]], tuple[Inputs, Any]]:
    """Padding to the longest of the batch; one label, or a fixed number, for each sample."""

    def collate(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, Any]:
        return padded_inputs(pretrained, rows), torch.tensor([row["labels"] for row in rows], dtype=label_dtype)

    return collate


def collate_tokens(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, Any]:
    """Padding to the longest of the batch, labels [b, t] of tokens on the same side."""
    inputs = padded_inputs(pretrained, rows)
    return inputs, padded_labels(rows, inputs["input_ids"].shape[1], pretrained.tokenizer.padding_side)


def collate_next_tokens(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, Any]:
    """As ``collate_tokens``, with no loss for a token whose predecessor is padding.

    A token after padding (on the left) is the first of its sample: alone it would be predicted from nothing.
    """
    inputs, labels = collate_tokens(pretrained, rows)
    mask = inputs["attention_mask"].bool()
    before = torch.nn.functional.pad(mask[:, :-1], (1, 0), value=True)
    return inputs, labels.masked_fill(~(mask & before), IGNORED)


def collate_spans(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, Any]:
    """Padding to the longest of the batch; labels [b, 2], moved by what is padded on the left."""
    inputs = padded_inputs(pretrained, rows)
    labels = torch.tensor([row["labels"] for row in rows])
    if pretrained.tokenizer.padding_side == "left":
        width = inputs["input_ids"].shape[1]
        labels = labels + torch.tensor([[width - len(row["input_ids"])] for row in rows])
    return inputs, labels


def collate_sequences(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, Any]:
    """Encoder inputs, and the labels shifted by one as the decoder's.

    The decoder gets another width than the encoder, so that no activation's tokens can be taken for the other's.
    """
    inputs = padded_inputs(pretrained, rows)
    width = max(len(row["labels"]) for row in rows)
    width += width == inputs["input_ids"].shape[1]
    labels = padded_labels(rows, width, "right")
    model: Any = pretrained.model
    inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    inputs["decoder_attention_mask"] = (labels != IGNORED).long()
    return inputs, labels


def padded_inputs(pretrained: PretrainedModel, rows: Sequence[Features]) -> Inputs:
    """What the tokenizer made of the rows, padded to the longest, with an attention mask."""
    tokenizer = pretrained.tokenizer
    names = [name for name in rows[0] if name != "labels"]
    inputs: Inputs = dict(
        tokenizer.pad({name: [row[name] for row in rows] for name in names}, padding=True, return_tensors="pt")
    )
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    return inputs


def padded_labels(rows: Sequence[Features], width: int, side: str) -> torch.Tensor:
    """int64 [b, width], no loss where there is padding."""
    labels = torch.full((len(rows), width), IGNORED)
    for row, features in enumerate(rows):
        of_sample = torch.tensor(features["labels"])
        start = width - len(of_sample) if side == "left" else 0
        labels[row, start : start + len(of_sample)] = of_sample
    return labels


def _tokenized(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig) -> list[Features]:
    texts = [config.source_prefix + text for text in dataset.columns["text"]]
    pairs = list(dataset.columns["pair"]) if "pair" in dataset.columns else None
    return _samples(pretrained.tokenizer(texts, pairs, truncation=True, max_length=config.max_length))


def _samples(encoded: Any) -> list[Features]:
    return [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]


def _span(windows: Any, window: int, start: int, end: int) -> tuple[int, int] | None:
    """First and last token of the characters [start, end) of the context; None where the window lacks some of them."""
    if start == end:
        return 0, 0
    places = zip(windows.sequence_ids(window), windows["offset_mapping"][window], strict=True)
    inside = [token for token, (part, (a, b)) in enumerate(places) if part == 1 and a < end and b > start]
    if not inside:
        return None
    offsets = windows["offset_mapping"][window]
    whole = offsets[inside[0]][0] <= start and offsets[inside[-1]][1] >= end
    return (inside[0], inside[-1]) if whole else None


def _fast(pretrained: PretrainedModel, task: str) -> Any:
    if not pretrained.tokenizer.is_fast:
        raise ConfigurationError(
            f"model.task: {task} needs to know which token comes from which word, which "
            f"{type(pretrained.tokenizer).__name__} of {pretrained.path} does not say; give a model with a fast "
            "tokenizer (tokenizer.json)"
        )
    return pretrained.tokenizer
