"""Token ids against the model's embeddings: an id without a row would end inside the model in an index error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layerlens.exceptions import ConfigurationError
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.integrations.transformers import embedding_rows

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
            f"{rows} tokens, its tokenizer {len(pretrained.tokenizer)}; save the model after "
            "model.resize_token_embeddings(len(tokenizer)), or give the tokenizer that belongs to it"
        )


def _largest(ids: Any) -> int:
    if isinstance(ids, (int, float)):  # the class of a sample
        return 0
    return int(ids.max()) if hasattr(ids, "max") else int(max(ids, default=0))
