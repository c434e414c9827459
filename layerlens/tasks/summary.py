"""What was read, from a data set and its encoded batches, for any task: figures of tokens, classes, and one sample."""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import Any

from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.models.data_summary import DataSummary, TokenFigures
from layerlens.tasks.batches import Batch, Batches
from layerlens.tasks.encoded import Encoded
from layerlens.tasks.losses import IGNORED
from layerlens.tasks.task import Task

SHOWN_CHARACTERS = 2000


def summarise(
    task: Task, pretrained: PretrainedModel, dataset: Dataset, samples: Dataset, batches: Batches, config: DataConfig
) -> DataSummary:
    """What is known of the data of a run.

    Args:
        task: what the model is tuned for.
        pretrained: has the tokenizer.
        dataset: all that was read.
        samples: those of it that ``batches`` are made of.
        batches: what the model is given.
        config: how they were encoded.
    """
    reading = dataset.reading
    left_out = [*reading.reasons] if reading is not None else []
    notes = reading.notes if reading is not None else ()
    encoded = batches.features
    if isinstance(encoded, Encoded):
        notes = (*notes, *encoded.said)
        left_out += [(n, f"{reason} (of the {len(samples):,} encoded)") for reason, n in encoded.left_out.items()]
    return DataSummary(
        source=dataset.description,
        rows=reading.total if reading is not None else len(dataset),
        samples=len(dataset),
        used=reading.used if reading is not None else tuple(dataset.columns),
        unused=reading.unused if reading is not None else (),
        left_out=tuple(left_out),
        notes=notes,
        encoded=len(encoded),
        tokens=_tokens(task, pretrained, samples, batches, config),
        classes=_classes(dataset),
        shown=_shown(task, pretrained, samples, batches),
    )


def _tokens(
    task: Task, pretrained: PretrainedModel, samples: Dataset, batches: Batches, config: DataConfig
) -> TokenFigures | None:
    features = batches.features
    if not len(features) or "input_ids" not in features[0] or task.inputs == "image":
        return None
    lengths: list[int] = []
    with_loss = 0
    of_tokens = False
    for batch in batches:
        if not batch.masks:
            return None
        lengths += [int(n) for n in batch.masks[0].sum(dim=1).unflatten(0, (-1, batch.rows)).sum(dim=1)]
        labels__bt = _token_labels(batch)
        if labels__bt is not None and (task.token_labels or batch.rows > 1):
            of_tokens, counted = True, labels__bt[..., task.shift :]
            with_loss += int((counted != IGNORED).sum())
    own = sum(lengths)
    if of_tokens and len(batches[0].masks) > 1:  # the decoder's tokens are those that can have a loss
        own = sum(int(batch.masks[1].sum()) for batch in batches)
        with_loss = min(with_loss, own)
    cut, truncated = 0, 0
    if isinstance(features, Encoded):
        cut, truncated = features.cut, features.truncated
    else:
        truncated = _truncated(pretrained, samples, features, config)
    return TokenFigures(
        float(median(lengths)), max(lengths), own, with_loss if of_tokens else None, truncated=truncated, cut=cut
    )


def _token_labels(batch: Batch) -> Any:
    """The labels [b, t] (of pairs [b, 2, t]) of tokens; None where labels are something else."""
    import torch

    labels = batch.labels.get("labels") if isinstance(batch.labels, dict) else batch.labels
    return labels if isinstance(labels, torch.Tensor) and labels.dim() > 1 and not labels.is_floating_point() else None


def _truncated(pretrained: PretrainedModel, samples: Dataset, features: Any, config: DataConfig) -> int:
    """Samples that are longer than ``data.max_length``: those as long as that are tokenised once more, whole."""
    name = "words" if "words" in samples.columns else "text"
    if name not in samples.columns or len(features) != len(samples):
        return 0
    full = [i for i, one in enumerate(features) if len(one["input_ids"]) >= config.max_length]
    if not full:
        return 0
    texts: list[Any] = [samples.columns[name][i] for i in full]
    texts = [list(one) for one in texts] if name == "words" else [config.source_prefix + one for one in texts]
    pairs = [samples.columns["pair"][i] for i in full] if "pair" in samples.columns else None
    whole = pretrained.tokenizer(texts, pairs, is_split_into_words=name == "words", verbose=False)["input_ids"]
    return sum(len(one) > config.max_length for one in whole)


def _classes(dataset: Dataset) -> dict[str, int]:
    names = dataset.label_names
    counted: Counter[int] = Counter()
    for label in dataset.labels if names else ():
        counted.update(label if isinstance(label, tuple) else [label])
    return {name: counted[index] for index, name in enumerate(names)}


def _shown(task: Task, pretrained: PretrainedModel, samples: Dataset, batches: Batches) -> dict[str, str]:
    """The first encoded sample: its inputs as text, special tokens included, and what has a loss."""
    if not len(batches):
        return {}
    batch = next((one for one in batches if 0 in one.index.tolist()), batches[0])
    place = batch.index.tolist().index(0) if 0 in batch.index.tolist() else 0
    if not batch.masks or pretrained.tokenizer is None or "input_ids" not in batch.inputs:
        inputs = {name: f"{value.dtype} {list(value.shape[1:])}" for name, value in batch.inputs.items()}
        return {**inputs, **_target(samples, batch, place)}
    decode = pretrained.tokenizer.decode
    rows = range(place * batch.rows, (place + 1) * batch.rows)
    texts = [_short(decode(batch.inputs["input_ids"][row][batch.mask[row].bool()])) for row in rows]
    last = len(task.row_names) - 1
    names = [task.row_names[min(row, last)] + (f" {row - last + 1}" if row > last else "") for row in range(batch.rows)]
    found = dict(zip(names, texts, strict=True))
    labels = _token_labels(batch)
    if labels is None:
        return {**found, **_target(samples, batch, place)}
    of_rows = labels.flatten(0, -2)
    for name, row in zip(list(found), rows, strict=True):
        own = of_rows[row]
        said = f"loss on the {name}" if batch.rows > 1 else "loss on"
        if samples.label_names and "words" in samples.columns:
            words = samples.columns["words"][int(batch.index[place])]
            tags = [samples.label_names[int(tag)] for tag in own[own != IGNORED]]
            found[said] = _short(" ".join(f"{word}/{tag}" for word, tag in zip(words, tags, strict=False)))
        elif task.token_labels or batch.rows > 1:
            counted = own.clone()
            counted[: task.shift] = IGNORED
            found[said] = _short(decode(counted[counted != IGNORED]))
        else:
            found["target"] = str(own.tolist())
    return found


def _target(samples: Dataset, batch: Batch, place: int) -> dict[str, str]:
    number = int(batch.index[place])
    label = samples.labels[number] if number < len(samples) else None
    if label is None:
        return {}
    if samples.label_names:
        several = label if isinstance(label, tuple) else (label,)
        return {"class": ", ".join(samples.label_names[one] for one in several) or "none"}
    return {"target": _short(str(label))}


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
