"""Chats about images, for vision-language models: what the assistant says, through the model's processor.

A sample's ids are kept without what its images become; the processor makes that, and the pixels, when the batch is
asked for, so that images are decoded then and not before. Each sample is measured alone: what these models make of
images has no axis of samples (Qwen-VL has the patches of all images of a batch in one row), and alone every token is of
its sample.
"""

from __future__ import annotations

import difflib
import inspect
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from layerlens.config import DataConfig
from layerlens.data.conversations import OddRow
from layerlens.data.dataset import Dataset
from layerlens.data.language_rows import read_language
from layerlens.data.table import Table
from layerlens.exceptions import ConfigurationError, DataError
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.integrations.torch_modules import precision_of
from layerlens.tasks.batches import Features, Inputs
from layerlens.tasks.causal_lm import AHEAD, ALL_PROMPT, rows_of
from layerlens.tasks.chat import Chat
from layerlens.tasks.encoded import Encoded, common_prefix
from layerlens.tasks.losses import IGNORED, causal_loss, logits_of
from layerlens.tasks.metrics import TARGETS, Decode, Judged, Metrics, Record, finish_tokens, mean_loss
from layerlens.tasks.task import Task

PROCESSOR_FILE = "preprocessor_config.json"
LEAVE_OUT = "; leave it out"
TRIED = 3
"""Samples of each number of images that the processor is tried with until it takes one."""


def read(table: Table, config: DataConfig) -> Dataset:
    """Chats, or questions and answers, with images.

    Raises:
        DataError: the rows have no images.
    """
    dataset = read_language(table, config, images=True)
    if "images" not in dataset.columns:
        raise DataError(
            f"data.source: {table.place} has no images; its columns are {', '.join(table.columns)}; name theirs in "
            "data.image_column, or set model.task: causal-lm"
        )
    return dataset


def encode(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Samples with the ids of their text, labels of what the assistant says, and images that are still encoded.

    Raises:
        ConfigurationError: the model reads text alone.
    """
    chat = Chat(pretrained)
    if pretrained.processor is None:
        has = f"has no processor for them ({PROCESSOR_FILE}); take a vision-language model with its processor"
        if pretrained.no_processor:
            has = f"has a processor that cannot be loaded: {pretrained.no_processor}; repair it"
        raise ConfigurationError(
            f"data.source: the rows have images, and {pretrained.path} {has}, or leave the column out"
        )
    found = Encoded(len(dataset), config.max_length)
    for row in rows_of(dataset):
        try:
            ids, said = chat.assistant(row["messages"])
        except OddRow as odd:
            found.left_out[str(odd)] += 1
            continue
        labels = [token if own else IGNORED for token, own in zip(ids, said, strict=True)]
        if not any(label != IGNORED for label in labels[AHEAD:]):
            found.left_out[ALL_PROMPT] += 1
            continue
        longer = len(ids) > config.max_length
        found.append({"input_ids": ids, "labels": labels, "turns": row["messages"], "images": row["images"]})
        if longer:
            found.said["samples with images are not truncated to data.max_length"] = None
    found.said |= chat.said
    if config.packing != "none":
        found.said["samples with images are not packed (data.packing)"] = None
    return _taken_by_processor(pretrained, found)


def _taken_by_processor(pretrained: PretrainedModel, found: Encoded) -> Encoded:
    """The samples without those that the processor refuses.

    It is asked with a few samples of each number of images: of a number that it refuses every time, none is taken.

    Raises:
        ConfigurationError: it refuses all.
    """
    of_count = defaultdict[int, list[Features]](list)
    for one in found:
        of_count[len(one["images"])].append(one)
    refused: dict[int, str] = {}
    accepted: dict[bool, Features] = {}
    for count, samples in sorted(of_count.items()):
        for one in samples[:TRIED]:
            reason = _refusal(pretrained, [one])
            if not reason:
                accepted[count > 0] = one
                break
            refused[id(one)] = reason
        else:
            refused |= dict.fromkeys(map(id, samples), reason)
    if len(accepted) == len((False, True)):
        reason = _refusal(pretrained, [accepted[False], accepted[True]])
        if reason:
            together = f"it has no image, and others have one: together {reason}"
            refused |= dict.fromkeys((id(one) for one in of_count[0]), together)
    if found and len({id(one) for one in found} - set(refused)) == 0:
        raise ConfigurationError(
            f"data.source: no chat can be used: {next(iter(refused.values()))}; change the chats, or take a model "
            "whose processor takes them"
        )
    kept = found.like()
    for one in found:
        if id(one) in refused:
            kept.left_out[refused[id(one)]] += 1
        else:
            kept.append(one)
    return kept


def _refusal(pretrained: PretrainedModel, samples: Sequence[Features]) -> str:
    """What a processor says against the samples; "" where it takes them."""
    try:
        collate(pretrained, samples)
    except DataError as error:
        return str(error).removeprefix("data.source: ").removesuffix(LEAVE_OUT)
    return ""


def collate(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, Any]:
    """What the processor makes of the chats, with what the model takes of it, and labels [b, t].

    Raises:
        DataError: the processor refuses a chat, or an image cannot be read.
    """
    import torch

    processor: Any = pretrained.processor
    filled = [_filled(row["turns"], row["images"]) for row in rows]
    try:
        encoded = processor.apply_chat_template(
            filled,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": len(rows) > 1},
        )
    except Exception as error:  # processors raise whatever their code meets
        counts = " and ".join(str(len(row["images"])) for row in rows)
        said = " ".join(str(error).split())[:160]
        raise DataError(
            f"data.source: {type(processor).__name__} refuses a chat with {counts} images: "
            f"{type(error).__name__}: {said}{LEAVE_OUT}"
        ) from error
    taken = inspect.signature(pretrained.model.forward).parameters
    open_ended = any(one.kind is one.VAR_KEYWORD for one in taken.values())
    dtype = precision_of(pretrained.model)
    inputs: Inputs = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in encoded.items()
        if isinstance(value, torch.Tensor) and name != "labels" and (open_ended or name in taken)
    }
    by_suffix = "labels" in encoded and "token_type_ids" in inputs
    ids__bt = inputs["input_ids"]
    mask__bt = inputs.setdefault("attention_mask", torch.ones_like(ids__bt)).bool()
    labels__bt = torch.full_like(ids__bt, IGNORED)
    for place, row in enumerate(rows):
        whole = ids__bt[place][mask__bt[place]].tolist()
        labels = spread_labels(row["input_ids"], row["labels"], whole)
        if _spoken(labels) != _spoken(row["labels"]):
            raise DataError(
                f"data.source: {type(processor).__name__} formats a chat differently from its chat template, so the "
                f"assistant's tokens are unknown{LEAVE_OUT}"
            )
        labels__bt[place][mask__bt[place]] = torch.tensor(labels)
        if by_suffix:  # PaliGemma: tokens of type 0 see each other both ways, so what is predicted has to have type 1
            first = int((labels__bt[place] != IGNORED).nonzero()[0])
            inputs["token_type_ids"][place, first:] = mask__bt[place, first:].to(inputs["token_type_ids"].dtype)
    return inputs, labels__bt


def spread_labels(ids: Sequence[int], labels: Sequence[int], whole: Sequence[int]) -> list[int]:
    """The labels of ``ids`` at the places that these have in ``whole``, where images take more room than in ``ids``.

    >>> spread_labels([1, 9, 2, 3], [-100, -100, -100, 3], [1, 9, 9, 9, 2, 3])
    [-100, -100, -100, -100, -100, 3]
    """
    found = [IGNORED] * len(whole)
    tail = common_prefix(list(reversed(ids)), list(reversed(whole)))
    if any(label != IGNORED for label in labels[: len(ids) - tail]):  # an image comes after what the assistant said
        matcher = difflib.SequenceMatcher(None, ids, whole, autojunk=False)
        for block in matcher.get_matching_blocks():
            found[block.b : block.b + block.size] = labels[block.a : block.a + block.size]
        return found
    found[len(whole) - tail :] = labels[len(ids) - tail :]
    return found


def _spoken(labels: Sequence[int]) -> list[int]:
    return [label for label in labels if label != IGNORED]


def _filled(turns: Sequence[Any], images: Sequence[Any]) -> list[Any]:
    """The turns as processors take them: every content in parts, with its opened images in their places."""
    opened = iter([image.open("RGB") for image in images])
    filled = []
    for turn in turns:
        content = turn["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
        parts = [{"type": "image", "image": next(opened)} if one.get("type") == "image" else one for one in parts]
        filled.append({**turn, "content": parts})
    return filled


def _record(output: Any, batch: Judged, decode: Decode | None) -> Record:
    """As of texts; the model's own output is inside of ``output``, which has the mean loss of the labelled tokens."""
    labels__bt: Any = batch[TARGETS]
    next__bt, logits__btc = labels__bt[:, AHEAD:], logits_of(output.output)[:, :-AHEAD]
    kept = next__bt != IGNORED
    right = (logits__btc.argmax(-1) == next__bt)[kept]
    return {**mean_loss(output, int(kept.sum())), "right": int(right.sum())}


TASK = Task(
    name="image-text",
    description="next tokens of the assistant's turns in chats about images, or of answers to questions about images; "
    "`causal-lm` takes such rows too",
    inputs="text",
    read=read,
    encode=encode,
    collate=collate,
    loss=causal_loss,
    metrics=Metrics(_record, finish_tokens, ("perplexity",), lower=("perplexity",)),
    auto_class="AutoModelForImageTextToText",
    model_targets=(),
    token_labels=True,
    shift=AHEAD,
    no_study="images of several sizes leave its inputs without an axis of samples",
    alone=True,
)
