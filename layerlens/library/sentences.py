"""A SentenceTransformer as what is planned on: the transformer in it, with its tokenizer and the modules after it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from layerlens.exceptions import ConfigurationError
from layerlens.integrations.sentence_models import LIBRARY, LOSSES, sentence_model_of
from layerlens.library.objects import Objects

TASK = "sentence-embedding"
COLUMNS, SCORED = ("anchor", "positive", "negative"), ("sentence1", "sentence2")
"""Names of texts of pairs and triplets, and of scored pairs."""


def transformer_in(thing: Any) -> Any:
    """The transformer in a model of sentence-transformers; anything else is given back. Imports nothing."""
    inner = getattr(thing, "transformers_model", None) if _kinds(thing) else None
    return thing if inner is None else inner


def _kinds(thing: Any) -> list[str]:
    """Names of the classes of sentence-transformers' models that this is of."""
    of_library = (kind for kind in type(thing).mro() if kind.__module__.startswith(LIBRARY))
    return [kind.__name__ for kind in of_library if hasattr(kind, "transformers_model")]


def of_sentence_model(objects: Objects) -> Objects:
    """The same, with the transformer in place of a SentenceTransformer, which is what PEFT adapts there.

    Raises:
        ConfigurationError: another task, or a loss of the library, is given beside it; it is a cross-encoder or such.
        ModelSpecError: it does not begin with a Transformer.
    """
    model, name = objects.model, type(objects.model).__name__
    if not _kinds(model):
        return objects
    if "SentenceTransformer" not in _kinds(model):
        raise ConfigurationError(
            f"model: a {name} does not make embeddings of single texts; give its trainer, or model.transformers_model "
            "with tokenizer= and task="
        )
    if objects.task not in (None, TASK):
        raise ConfigurationError(
            f"task: a {name} is planned for the task {TASK}, got {objects.task!r}; for another give "
            "model.transformers_model"
        )
    if objects.loss is not None:
        raise ConfigurationError(
            f"loss: a {name} takes one of sentence-transformers by name: embedding_loss={'|'.join(LOSSES)}; for "
            "another give the SentenceTransformerTrainer that has it: layerlens.plan(trainer)"
        )
    after = sentence_model_of(model)
    tokenizer = objects.tokenizer if objects.tokenizer is not None else model.tokenizer
    data = _as_rows(objects.data)
    return replace(objects, model=model.transformers_model, data=data, task=TASK, tokenizer=tokenizer, sentence=after)


def _as_rows(data: Any) -> Any:
    """Rows of ``InputExample``s (of the library's former ``fit``) or of tuples of texts, alone or in a DataLoader; any
    other data as they are.
    """
    items = data.dataset if hasattr(data, "dataset") and hasattr(data, "batch_size") else data
    if not isinstance(items, (list, tuple)) or not items:
        return data
    texts: list[Any] = [getattr(one, "texts", one) for one in items]
    if not all(
        isinstance(one, (list, tuple)) and len(one) > 1 and all(isinstance(x, str) for x in one) for one in texts
    ):
        return data
    labels = [getattr(one, "label", 0) for one in items]
    if any(labels) and all(len(one) == len(SCORED) for one in texts):  # without labels they are all 0
        return [dict(zip(SCORED, one, strict=True)) | {"score": x} for one, x in zip(texts, labels, strict=True)]
    names = [*COLUMNS, *(f"negative_{number}" for number in range(2, max(map(len, texts))))]
    return [dict(zip(names, one, strict=False)) for one in texts]
