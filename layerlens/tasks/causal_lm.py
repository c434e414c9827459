"""Causal language modelling: every next token of a text, or of the answers in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from layerlens.config import DataConfig
from layerlens.data.conversations import OddRow, question_turns
from layerlens.data.dataset import Dataset
from layerlens.data.language_rows import read_language
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.tasks.batches import Features, Inputs
from layerlens.tasks.chat import Chat
from layerlens.tasks.encoded import Encoded, completion
from layerlens.tasks.losses import IGNORED, causal_loss
from layerlens.tasks.metrics import Metrics, finish_tokens, record_tokens
from layerlens.tasks.packing import collate_packed, pack
from layerlens.tasks.task import Task
from layerlens.tasks.text import claim_language, collate_tokens, without_classes

AHEAD = 1
ALL_PROMPT = "no token of the answer is left within data.max_length"


def encode(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Samples of at most ``data.max_length`` tokens, each with labels where there is loss.

    Of texts that is every token, the end-of-text token included, and longer ones become several samples; of prompts
    with their answers it is the answer, of chats what the assistant says.
    """
    chat = Chat(pretrained)
    found = Encoded(len(dataset), config.max_length)
    for row in rows_of(dataset):
        try:
            whole = "text" in row
            ids, labels = _text(chat, row, config) if whole else _answered(chat, row, config)
        except OddRow as odd:
            found.left_out[str(odd)] += 1
            continue
        if config.packing == "none":
            _take(found, ids, labels, cut=whole)
        else:
            found.append({"input_ids": ids, "labels": labels})
    found.said |= chat.said
    return found if config.packing == "none" else pack(found, config.packing)


def rows_of(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Each sample by its columns."""
    names = list(dataset.columns)
    for values in zip(*dataset.columns.values(), strict=True):
        yield dict(zip(names, values, strict=True))


def _text(chat: Chat, row: Mapping[str, Any], config: DataConfig) -> tuple[list[int], list[int]]:
    ids = chat.ids(chat.ended(config.source_prefix + row["text"]))
    return ids, list(ids)


def _answered(chat: Chat, row: Mapping[str, Any], config: DataConfig) -> tuple[list[int], list[int]]:
    if "messages" in row:
        tools = row.get("tools")
        ids, said = chat.assistant(row["messages"], json.loads(tools) if isinstance(tools, str) and tools else tools)
        return ids, [token if own else IGNORED for token, own in zip(ids, said, strict=True)]
    prompt, answer = prompted(chat, row, config, "completion" if "completion" in row else "answer")
    ids, start = chat.continued(prompt, answer)
    return ids, completion(ids, start)


def prompted(chat: Chat, row: Mapping[str, Any], config: DataConfig, answer: str) -> tuple[Any, Any]:
    """The prompt of a row and one of its answers: both texts, or both turns of a chat."""
    if "question" not in row:
        prompt = row["prompt"]
        return (config.source_prefix + prompt if isinstance(prompt, str) else prompt), row[answer]
    question, system = config.source_prefix + row["question"], row["system"]
    if chat.template:
        return question_turns(question, system), [{"role": "assistant", "content": row[answer]}]
    return "\n\n".join(filter(None, [system, question])) + "\n", row[answer]


def _take(found: Encoded, ids: list[int], labels: list[int], *, cut: bool) -> None:
    """Add a row's samples: all pieces of it, or its beginning."""
    limit = found.limit
    if len(ids) > limit:
        found.cut += cut
        found.truncated += not cut
    starts = range(0, len(ids), limit) if cut else (0,)
    pieces = [(ids[start : start + limit], labels[start : start + limit]) for start in starts]
    sound = [piece for piece in pieces if any(label != IGNORED for label in piece[1][AHEAD:])]
    if not sound:
        found.left_out["fewer than two tokens" if cut else ALL_PROMPT] += 1
    found.extend({"input_ids": a, "attention_mask": [1] * len(a), "labels": b} for a, b in sound)


def collate(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, Any]:
    """As ``collate_tokens``, with no loss for a token whose predecessor is padding.

    A token after padding (on the left) is the first of its sample: alone it would be predicted from nothing.
    """
    import torch

    if "position_ids" in rows[0]:
        return collate_packed(rows)
    inputs, labels = collate_tokens(pretrained, rows)
    mask = inputs["attention_mask"].bool()
    before = torch.nn.functional.pad(mask[:, :-AHEAD], (AHEAD, 0), value=True)
    return inputs, labels.masked_fill(~(mask & before), IGNORED)


TASK = Task(
    name="causal-lm",
    description="next tokens: all tokens of texts, the answers to prompts and questions, the assistant's turns of "
    "chats; preference pairs are trained as `dpo`",
    inputs="text",
    read=partial(read_language, images=True),
    claim=partial(claim_language, pairs=False),
    of_classes=without_classes,
    encode=encode,
    collate=collate,
    loss=causal_loss,
    metrics=Metrics(partial(record_tokens, shift=AHEAD), finish_tokens, ("perplexity",), lower=("perplexity",)),
    auto_class="AutoModelForCausalLM",
    class_endings=("LMHeadModel", "DoubleHeadsModel"),
    token_labels=True,
    shift=AHEAD,
    synthetic_labels=lambda ids__bt: ids__bt.clone(),
)
