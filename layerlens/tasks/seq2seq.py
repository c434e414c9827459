"""Sequence to sequence: a target text for each source text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.data.language_rows import read_language, recognise
from layerlens.data.table import Table
from layerlens.exceptions import ConfigurationError
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.tasks.batches import Features, Inputs
from layerlens.tasks.losses import IGNORED, token_loss
from layerlens.tasks.metrics import TOKENS
from layerlens.tasks.task import Claim, Task
from layerlens.tasks.text import padded_inputs, padded_labels, tokenized

if TYPE_CHECKING:
    import torch

SOURCES = ("source", "text", "document", "article", "dialogue", "input", "inputs")
TARGETS = ("target", "summary", "highlights", "translation", "output", "targets")
LANGUAGE = re.compile(r"(?!id$)[a-z]{2,3}([-_][A-Za-z]{2,4})*")
"""A language's code, such as ``en``, ``de_DE`` or ``fra_Latn``."""

QUESTIONS = ("instruction", "question and answer", "prompt and completion")
"""Shapes of rows whose parts make a source and a target."""


def read(table: Table, config: DataConfig) -> Dataset:
    """Source texts and target texts: of a known shape with all its parts (an instruction and its input, a passage and
    the question), else of one column each.
    """
    found = recognise(table, config) if config.text_column is None and config.label_column is None else None
    if found is not None and found.shape.name in QUESTIONS:
        rows = read_language(table, config)
        if "messages" in rows.columns:  # with turns before the question
            said = [[str(turn["content"]) for turn in turns] for turns in rows.columns["messages"]]
            sources = tuple("\n\n".join(turns[:-1]) for turns in said)
            return replace(rows, columns={"text": sources}, labels=tuple(turns[-1] for turns in said))
        source, target = ("question", "answer") if "question" in rows.columns else ("prompt", "completion")
        if all(isinstance(text, str) for text in (*rows.columns[source], *rows.columns[target])):
            systems = rows.columns.get("system", ("",) * len(rows))
            texts = zip(systems, rows.columns[source], strict=True)
            sources = tuple("\n\n".join(filter(None, parts)) for parts in texts)
            return replace(rows, columns={"text": sources}, labels=rows.columns[target])
    pair = _languages(table, config)
    if pair:
        table.notes.append(
            f"translated from {pair[0]} to {pair[1]}; for the other direction set data.text_column: {pair[1]} and "
            f"data.label_column: {pair[0]}"
        )
    source = table.find(config.text_column, "text_column", (*pair[:1], *SOURCES))
    target = table.find(config.label_column, "label_column", (*pair[1:], *TARGETS))
    return Dataset({"text": table.texts(source)}, table.texts(target), (), table.place)


def _languages(table: Table, config: DataConfig) -> list[str]:
    """The two columns that are one text in two languages, those of a mapping ``translation`` or named by languages."""
    if config.text_column is not None or config.label_column is not None:
        return []
    inside = [name for name in table.columns if name.startswith("translation.")]
    named = [name for name in table.columns if LANGUAGE.fullmatch(name)]
    pair = inside or named
    texts = all(isinstance(value, str) for name in pair for value in table.peek(name) if value is not None)
    return pair if len(pair) == 2 and texts else []


def claim(table: Table, config: DataConfig) -> Claim | None:
    """Two texts, of which the second is another for most samples, or rows of a shape that can be made such."""
    found = recognise(table, config) if config.text_column is None and config.label_column is None else None
    if found is not None and found.shape.name in QUESTIONS:
        columns = list(found.columns.values())
        return Claim(max(2, len(columns)), f"{found.shape.name} in the columns {', '.join(columns)}")
    if pair := _languages(table, config):
        return Claim(2, f"texts in {pair[0]} and {pair[1]}")
    source, target = table.named(config.text_column, SOURCES), table.named(config.label_column, TARGETS)
    if not source or not target or target in table.repeating(config):
        return None
    values = [value for name in (source, target) for value in table.peek(name) if value is not None]
    texts = all(isinstance(value, str) for value in values)
    return Claim(2, f"source texts in column {source!r} and target texts in {target!r}") if texts else None


def encode(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Source texts, each with the tokens of its target text as labels."""
    encoded = tokenized(pretrained, dataset, config)
    longest = config.max_target_length or config.max_length
    targets = pretrained.tokenizer(text_target=list(dataset.labels), truncation=True, max_length=longest)["input_ids"]
    return [one | {"labels": labels} for one, labels in zip(encoded, targets, strict=True)]


def collate(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, Any]:
    """Encoder inputs, and the labels shifted by one as the decoder's.

    The decoder gets another width than the encoder, so that no activation's tokens can be taken for the other's.
    """
    inputs = padded_inputs(pretrained, rows)
    width = max(len(row["labels"]) for row in rows)
    width += width == inputs["input_ids"].shape[1]
    labels = padded_labels(rows, width, "right")
    inputs["decoder_input_ids"] = decoder_inputs(pretrained.model, labels)
    inputs["decoder_attention_mask"] = (labels != IGNORED).long()
    return inputs, labels


def decoder_inputs(model: Any, labels__bt: torch.Tensor) -> torch.Tensor:
    """The labels one place to the right, after the token that the decoder starts with: as the model makes them, or, of
    models that do so inside of ``forward`` alone (M2M100, NLLB), as transformers' ``shift_tokens_right`` has it.
    """
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        made: torch.Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels__bt)
        return made
    # The model's own configuration first: the part for a decoder of Whisper is made anew, with defaults.
    configs = (model.config, model.config.get_text_config(decoder=True))
    start, pad = (
        next((found for one in configs if (found := getattr(one, name, None)) is not None), None)
        for name in ("decoder_start_token_id", "pad_token_id")
    )
    if start is None:
        raise ConfigurationError(
            f"model.name_or_path: the configuration of {type(model).__name__} has no decoder_start_token_id; set it in "
            "config.json to the token that its decoder starts with"
        )
    shifted = labels__bt.roll(1, dims=1)
    shifted[:, 0] = start
    return shifted.masked_fill(shifted == IGNORED, pad if pad is not None else start)


TASK = Task(
    name="seq2seq",
    description="a target text for each source text",
    inputs="text",
    read=read,
    claim=claim,
    encode=encode,
    collate=collate,
    loss=token_loss,
    metrics=TOKENS,
    auto_class="AutoModelForSeq2SeqLM",
    class_endings=("ForConditionalGeneration", "MTModel"),
    token_labels=True,
)
