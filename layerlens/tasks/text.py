"""What tasks on text share: tokenising, padding on the tokenizer's side, and texts with one label or with none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.data.readers import FIRST
from layerlens.data.table import Table
from layerlens.exceptions import ConfigurationError
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.tasks.batches import Collate, Features, Inputs
from layerlens.tasks.losses import IGNORED
from layerlens.tasks.task import Claim

if TYPE_CHECKING:
    import torch

MANY = 20
"""From so many samples on, a whole number that no two of them share is a score, not a class."""


def read_plain_texts(table: Table, config: DataConfig) -> Dataset:
    """Texts that are their own targets."""
    return Dataset(table.text_columns(config, None), (None,) * len(table.rows), (), table.place)


def claim_plain_texts(table: Table, config: DataConfig) -> Claim | None:
    """Texts, whatever else there is."""
    column = table.text_column(config, table.labelled(config))
    return Claim(1, f"texts in column {column!r}") if column else None


def claim_labelled_texts(table: Table, config: DataConfig, told: Callable[[list[Any]], str]) -> Claim | None:
    """Texts with a label each that ``told`` has words for; a label column whose name says nothing counts as none."""
    named = table.labelled(config)
    repeating = () if named else table.repeating(config)
    column = named or (repeating[0] if len(repeating) == 1 else None)
    if column is None or table.text_column(config, column) is None:
        return None
    kind = told(table.values(column)[:FIRST])
    return Claim(2 if named else 1, f"{kind} in column {column!r}") if kind else None


def without_classes(dataset: Dataset) -> Dataset:
    """The samples as their own targets."""
    return replace(dataset, labels=(None,) * len(dataset), label_names=())


def encode_labelled(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Single texts or pairs, with the sample's label beside them."""
    encoded = tokenized(pretrained, dataset, config)
    return [one | {"labels": label} for one, label in zip(encoded, dataset.labels, strict=True)]


def collate_labelled(label_dtype: str) -> Collate:
    """Padding to the longest of the batch; one label, or a fixed number, for each sample."""

    def collate(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, Any]:
        import torch

        labels = torch.tensor([row["labels"] for row in rows], dtype=getattr(torch, label_dtype))
        return padded_inputs(pretrained, rows), labels

    return collate


def collate_tokens(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, Any]:
    """Padding to the longest of the batch, labels [b, t] of tokens on the same side."""
    inputs = padded_inputs(pretrained, rows)
    return inputs, padded_labels(rows, inputs["input_ids"].shape[1], pretrained.tokenizer.padding_side)


def padded_inputs(pretrained: PretrainedModel, rows: Sequence[Features]) -> Inputs:
    """What the tokenizer made of the rows, padded to the longest, with an attention mask."""
    import torch

    tokenizer = pretrained.tokenizer
    names = [name for name in rows[0] if name != "labels"]
    inputs: Inputs = dict(
        tokenizer.pad({name: [row[name] for row in rows] for name in names}, padding=True, return_tensors="pt")
    )
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    return inputs


def padded_labels(rows: Sequence[Features], width: int, side: str) -> torch.Tensor:
    """int64 [b, width], no loss where there is padding."""
    import torch

    labels = torch.full((len(rows), width), IGNORED)
    for row, features in enumerate(rows):
        of_sample = torch.tensor(features["labels"])
        start = width - len(of_sample) if side == "left" else 0
        labels[row, start : start + len(of_sample)] = of_sample
    return labels


def tokenized(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig) -> list[Features]:
    """Texts or pairs as token ids, cut to ``data.max_length``."""
    texts = [config.source_prefix + text for text in dataset.columns["text"]]
    pairs = list(dataset.columns["pair"]) if "pair" in dataset.columns else None
    return by_sample(pretrained.tokenizer(texts, pairs, truncation=True, max_length=config.max_length))


def by_sample(encoded: Any) -> list[Features]:
    """What a tokenizer returned for many samples as one mapping for each."""
    return [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]


def fast_tokenizer(pretrained: PretrainedModel, task: str) -> Any:
    """The model's tokenizer, which knows where each token comes from.

    Raises:
        ConfigurationError: it does not.
    """
    if not pretrained.tokenizer.is_fast:
        raise ConfigurationError(
            f"model.task: {task} needs to know which token comes from which word, which "
            f"{type(pretrained.tokenizer).__name__} of {pretrained.path} does not say; give a model with a fast "
            "tokenizer (tokenizer.json)"
        )
    return pretrained.tokenizer
