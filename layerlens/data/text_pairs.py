"""Tasks on two texts, by the names that their columns usually have."""

from __future__ import annotations

from layerlens.config import DataConfig
from layerlens.data.table import Table

TEXT_PAIRS = (
    ("question", "passage"),
    ("question", "sentence"),
    ("question", "context"),
    ("query", "passage"),
    ("query", "document"),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("text", "text_pair"),
    ("sentence_a", "sentence_b"),
)
"""Columns of BoolQ, QNLI, retrieval sets, NLI sets, MRPC and STS-B, QQP, and sets of pairs in general."""


def with_pair(table: Table, config: DataConfig) -> DataConfig:
    """The configuration with both columns of a known pair named, where it names neither."""
    if config.text_column is not None or config.pair_column is not None:
        return config
    by_name = {column.lower(): column for column in reversed(table.columns)}
    for text, pair in TEXT_PAIRS:
        if text in by_name and pair in by_name:
            return config.model_copy(update={"text_column": by_name[text], "pair_column": by_name[pair]})
    return config
