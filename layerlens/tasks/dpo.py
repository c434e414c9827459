"""Preference pairs: the better answer to a prompt is to gain on the worse one (Rafailov et al. 2023, arXiv:2305.18290).

A sample is a pair, two rows of the model's batch: the better answer, then the worse one. The loss of a pair depends on
no other pair. The reference is the model as training begins; its log-probabilities of both answers are computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from layerlens.config import DataConfig
from layerlens.data.conversations import OddRow
from layerlens.data.dataset import Dataset
from layerlens.data.language_rows import read_language
from layerlens.exceptions import DataError
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.tasks.batches import Batch, Features, Inputs
from layerlens.tasks.causal_lm import AHEAD, ALL_PROMPT, prompted, rows_of
from layerlens.tasks.chat import Chat
from layerlens.tasks.encoded import Encoded, completion
from layerlens.tasks.losses import IGNORED, logits_of
from layerlens.tasks.metrics import TARGETS, Judged, Metrics, Record, as_numpy, joined, mean_loss
from layerlens.tasks.task import Task
from layerlens.tasks.text import claim_language, padding_id

if TYPE_CHECKING:
    import torch

BETA = 0.1
"""How much a change of log-probabilities weighs, as DPOTrainer's default has it."""
ANSWERS = ("chosen", "rejected")
REFERENCE = "reference"


def read(table: Any, config: DataConfig) -> Dataset:
    """Preference pairs.

    Raises:
        DataError: the rows are something else.
    """
    dataset = read_language(table, config)
    if "rejected" not in dataset.columns:
        raise DataError(
            f"data.source: {table.place} has no preference pairs; its columns are {', '.join(table.columns)}; name "
            "them in data.chosen_column and data.rejected_column, or set model.task: causal-lm"
        )
    return dataset


def encode(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Of each pair the prompt with either answer, ended by the end-of-text token, cut to ``data.max_length``.

    Features: ``input_ids`` and ``labels`` of the better answer, ``rejected_ids`` and ``rejected_labels`` of the other.
    """
    chat = Chat(pretrained)
    found = Encoded(len(dataset), config.max_length)
    for row in rows_of(dataset):
        try:
            both = [chat.continued(*prompted(chat, row, config, answer)) for answer in ANSWERS]
        except OddRow as odd:
            found.left_out[str(odd)] += 1
            continue
        start = min(start for _, start in both)
        if start >= found.limit:
            found.left_out[ALL_PROMPT] += 1
            continue
        found.truncated += any(len(ids) > found.limit for ids, _ in both)
        chosen, rejected = (ids[: found.limit] for ids, _ in both)
        found.append({
            "input_ids": chosen, "labels": completion(chosen, start),
            "rejected_ids": rejected, "rejected_labels": completion(rejected, start),
        })  # fmt: skip
    found.said |= chat.said
    if config.packing != "none":
        found.said["preference pairs are not packed, neither by LayerLens nor by DPOTrainer (data.packing)"] = None
    return found


def collate(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, Any]:
    """Inputs [2b, t], the better answer of a pair and then the worse one; labels [b, 2, t] and, where it is known, the
    reference's log-probabilities [b, 2]. Padding is on the right, as DPOTrainer has it.
    """
    import torch

    ids = [torch.tensor(row[name]) for row in rows for name in ("input_ids", "rejected_ids")]
    labels = [torch.tensor(row[name]) for row in rows for name in ("labels", "rejected_labels")]

    def padded(parts: Sequence[torch.Tensor], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=value)

    targets = {"labels": padded(labels, IGNORED).unflatten(0, (-1, 2))}
    if all(REFERENCE in row for row in rows):
        targets[REFERENCE] = torch.tensor([row[REFERENCE] for row in rows])
    mask = padded([torch.ones_like(one) for one in ids], 0)
    return {"input_ids": padded(ids, padding_id(pretrained.tokenizer)), "attention_mask": mask}, targets


def answer_log_probabilities(output: Any, labels__brt: torch.Tensor) -> torch.Tensor:
    """Log-probability of each answer, [b, 2]: the sum over its tokens."""
    import torch

    labels = labels__brt.flatten(0, 1)[:, AHEAD:]
    losses = torch.nn.functional.cross_entropy(
        logits_of(output)[:, :-AHEAD].flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -losses.view(labels.shape).sum(dim=1).unflatten(0, (-1, 2))


def margins(output: Any, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """How much more the better answer of each pair has gained on the reference than the worse one, [b].

    Where no reference is given it is the model itself, as it is before the first step.
    """
    own__br = answer_log_probabilities(output, targets["labels"])
    gained__br = own__br - targets.get(REFERENCE, own__br.detach())
    return gained__br[:, 0] - gained__br[:, 1]


def dpo_loss(output: Any, batch: Batch, *, beta: float = BETA) -> torch.Tensor:
    """-log σ(β · margin) of each pair, [b]."""
    import torch

    return -torch.nn.functional.logsigmoid(beta * margins(output, batch.labels))


def add_reference(model: torch.nn.Module, pretrained: PretrainedModel, features: Sequence[Features], size: int) -> None:
    """Note in each pair the log-probabilities that ``model``, as it is now, gives its answers.

    Args:
        model: in any mode; measured without dropout.
        pretrained: has the tokenizer.
        features: the pairs; each gets "reference".
        size: pairs in a batch.
    """
    import torch

    from layerlens.integrations.placement import input_device
    from layerlens.integrations.torch_modules import in_evaluation_mode

    device = input_device(model)
    with in_evaluation_mode(model), torch.no_grad():
        for start in range(0, len(features), size):
            part = features[start : start + size]
            inputs, targets = collate(pretrained, [{**one, REFERENCE: [0.0, 0.0]} for one in part])
            output = model(**{name: tensor.to(device) for name, tensor in inputs.items()})
            logits = logits_of(output)
            for one, known in zip(
                part, answer_log_probabilities(logits, targets["labels"].to(logits.device)), strict=True
            ):
                one[REFERENCE] = known.tolist()


def _record(output: Any, batch: Judged, decode: Any) -> Record:
    device = logits_of(output.output).device
    targets: Any = batch[TARGETS]
    margins__b = margins(output.output, {name: tensor.to(device) for name, tensor in targets.items()})
    return {**mean_loss(output, len(margins__b)), "margins": as_numpy(margins__b)}


def _finish(records: Sequence[Record], labels: Sequence[str]) -> dict[str, float]:
    found = joined(records, "margins")
    return {"preferred": float((found > 0).mean()), "margin": float(np.mean(found))}


TASK = Task(
    name="dpo",
    description="preference pairs, with DPO's loss; evaluated by the share of pairs whose better answer gained more "
    "than the worse one, and by the mean margin",
    inputs="text",
    read=read,
    claim=partial(claim_language, pairs=True),
    encode=encode,
    collate=collate,
    loss=dpo_loss,
    metrics=Metrics(_record, _finish, ("loss",)),
    auto_class="AutoModelForCausalLM",
    model_targets=(),
    synthetic_labels=lambda ids__bt: ids__bt.clone(),
    reference=add_reference,
    row_names=("chosen", "rejected"),
    configure=lambda task, config, dataset: replace(task, loss=partial(dpo_loss, beta=config.dpo_beta)),
    no_study="each of its samples is a pair of rows, compared with what the frozen model says of them",
)
