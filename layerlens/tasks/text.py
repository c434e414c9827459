"""What tasks on text share: tokenising, padding on the tokenizer's side, and texts with one label or with none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.data.language_rows import recognise
from layerlens.data.rows import FIRST
from layerlens.data.table import Table
from layerlens.exceptions import ConfigurationError
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.tasks.batches import Collate, Features, Inputs
from layerlens.tasks.encoded import Encoded
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


def claim_language(table: Table, config: DataConfig, *, pairs: bool) -> Claim | None:
    """Rows of a shape that language models are trained on, or texts, whatever else there is; or preference pairs."""
    found = recognise(table, config)
    if pairs != (found is not None and found.shape.of_pairs):
        return None
    if found is None or "text" in found.columns:
        return claim_plain_texts(table, config)
    columns = list(dict.fromkeys(found.columns.values()))
    return Claim(max(2, len(columns)), f"{found.shape.name} in the columns {', '.join(columns)}")


def claim_labelled_texts(table: Table, config: DataConfig, told: Callable[[list[Any]], str]) -> Claim | None:
    """Texts with a label each that ``told`` has words for; a label column whose name says nothing counts as none."""
    named = table.labelled(config)
    repeating = () if named else table.repeating(config)
    column = named or (repeating[0] if len(repeating) == 1 else None)
    if column is None or table.text_column(config, column) is None:
        return None
    kind = told([value for value in table.peek(column)[:FIRST] if value is not None and value != ""])
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
    if tokenizer.pad_token is None:  # padding is masked, so any token will do
        fill = {"input_ids": padding_id(tokenizer), "token_type_ids": tokenizer.pad_token_type_id}
        width, left = max(len(row["input_ids"]) for row in rows), tokenizer.padding_side == "left"
        padded: Inputs = {}
        for name in dict.fromkeys([*names, "attention_mask"]):
            values = [list(row.get(name, [1] * len(row["input_ids"]))) for row in rows]
            missing = [[fill.get(name, 0)] * (width - len(one)) for one in values]
            both = zip(missing, values, strict=True) if left else zip(values, missing, strict=True)
            padded[name] = torch.tensor([one + other for one, other in both])
        return padded
    inputs: Inputs = dict(
        tokenizer.pad({name: [row[name] for row in rows] for name in names}, padding=True, return_tensors="pt")
    )
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    return inputs


def padding_id(tokenizer: Any) -> int:
    """The token that fills up shorter samples; masked, so any will do where the tokenizer has none."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in known if token is not None), 0)


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


def cut_texts(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig) -> Encoded:
    """Texts as token ids, those longer than ``data.max_length`` as several samples, each with its special tokens."""
    tokenizer, found = pretrained.tokenizer, Encoded(len(dataset), config.max_length)
    if not tokenizer.is_fast:  # such a tokenizer gives the rest of one text only
        found.extend(tokenized(pretrained, dataset, config))
        found.truncated = sum(len(one["input_ids"]) == config.max_length for one in found)
        return found
    texts = [config.source_prefix + text for text in dataset.columns["text"]]
    encoded = tokenizer(texts, truncation=True, max_length=config.max_length, return_overflowing_tokens=True)
    of = encoded.pop("overflow_to_sample_mapping")
    found.extend(by_sample(encoded))
    found.cut = sum(n > 1 for n in Counter(of).values())
    return found


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
            f"model.task: {task} needs to know which token belongs to which word, which "
            f"{type(pretrained.tokenizer).__name__} of {pretrained.path} does not say; give a model with a fast "
            "tokenizer (tokenizer.json)"
        )
    return pretrained.tokenizer
