"""Token ids against the model's embeddings: an id without a row would end inside the model in an index error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layerlens.exceptions import ConfigurationError
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.integrations.transformers import embedding_rows
from layerlens.models.tokens import ROWS, TokenTraining

IDS = ("input_ids", "rejected_ids")


def check_token_ids(pretrained: PretrainedModel, features: Sequence[dict[str, Any]]) -> None:
    """Refuse samples with tokens that the model has no embeddings for.

    Raises:
        ConfigurationError: the token, how many the tokenizer has and how many the model.
    """
    rows = embedding_rows(pretrained.model)
    if rows is None or pretrained.tokenizer is None or len(pretrained.tokenizer) <= rows:
        return
    decoded = getattr(getattr(pretrained.model, "config", None), "is_encoder_decoder", False)
    names = (*IDS, "labels") if decoded else IDS
    largest = max((_largest(one[name]) for one in features for name in names if name in one), default=0)
    if largest >= rows:
        token = pretrained.tokenizer.convert_ids_to_tokens(largest)
        raise ConfigurationError(
            f"model.name_or_path: the samples have token {largest} ({token!r}), and the model has embeddings for "
            f"{rows} tokens, its tokenizer {len(pretrained.tokenizer)}; set model.resize_token_embeddings: true (of a "
            "model in memory, call resize_token_embeddings(len(tokenizer))), or give the tokenizer that belongs to "
            "the model"
        )


def told_of_tokens(pretrained: PretrainedModel) -> list[str]:
    """What the user should know of tokens and rows: tokens without one, and which rows are trained."""
    rows, tokens = embedding_rows(pretrained.model), pretrained.tokens
    if tokens is not None:
        new = f" of {rows}, of which {rows - old} are new" if rows and (old := _old_rows(tokens)) else ""
        what = f"{len(tokens.indices)} rows{new}," if tokens.by == ROWS else f"all {tokens.rows} rows"
        more = f", with those of {', '.join(tokens.tied)}, which share the weight" if tokens.tied else ""
        return [
            f"model: {what} of {' and '.join(tokens.modules)}{more}, are trained with the choice ({tokens.by}): "
            f"{tokens.trainable_params:,} parameters"
        ]
    if rows is None or pretrained.tokenizer is None or len(pretrained.tokenizer) <= rows:
        return []
    token = pretrained.tokenizer.convert_ids_to_tokens(rows)
    return [
        f"model: the tokenizer has {len(pretrained.tokenizer)} tokens, and the model has embeddings for {rows}; "
        f"LayerLens refuses texts with the others ({token!r} ...); set model.resize_token_embeddings: true to train "
        "with it"
    ]


def _old_rows(tokens: TokenTraining) -> int:
    """Rows that the checkpoint has of an embedding that was resized; 0 where it was not."""
    return next((shape[0] for name, shape in tokens.checkpoint_shapes.items() if name.startswith(tokens.modules[0])), 0)


def _largest(ids: Any) -> int:
    if isinstance(ids, (int, float)):  # the class of a sample
        return 0
    return int(ids.max()) if hasattr(ids, "max") else int(max(ids, default=0))
