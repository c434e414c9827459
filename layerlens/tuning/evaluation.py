"""Judging a model: its metrics over samples, on one process or shared among several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from layerlens.exceptions import TrainingError
from layerlens.tasks import task_metrics
from layerlens.tasks.metrics import Record
from layerlens.tuning.samples import Sample, TrainingData, on_device
from layerlens.utils.progress import Progress, silent


def evaluate(
    model: torch.nn.Module,
    data: TrainingData,
    task: str,
    *,
    samples: Sequence[Sample] | None = None,
    batch_size: int = 32,
    shared: bool = True,
    progress: Progress = silent,
) -> dict[str, float]:
    """Mean loss and the task's metrics over ``samples`` (the evaluation samples unless given), without gradients.

    Samples go into batches in their own order. In a distributed run every process takes its share of the batches and
    all of them return the same figures. The model is left in the mode it was in.

    Args:
        model: gives ``loss`` and ``logits`` (start and end logits for question answering) for a collated batch.
        data: how samples are collated.
        task: a name in ``TASKS``.
        shared: whether all processes of a distributed run call this; False where one of them does, alone.

    Returns:
        "loss" (mean over samples, or over tokens for language models), and metric by name.

    Raises:
        TrainingError: there are no samples, or there is no such task.
    """
    chosen, metrics = data.evaluation if samples is None else samples, task_metrics(task)
    if not len(chosen):
        raise TrainingError("there are no samples to evaluate on")
    rank, world = 0, 1
    if shared and torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    device = next(model.parameters()).device
    starts = list(range(0, len(chosen), batch_size))
    records: dict[int, Record] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), progress.stage("Evaluating", total=len(starts[rank::world])) as advance:
            for start in starts[rank::world]:
                batch = data.collate([chosen[index] for index in range(start, min(start + batch_size, len(chosen)))])
                batch = on_device(batch, device)
                records[start] = metrics.record(data.output(model, batch), batch, data.decode)
                advance(1)
    finally:
        model.train(was_training)
    if world > 1:
        records = _gathered(records, world)
    in_order = [records[start] for start in starts]
    loss = sum(record["loss"] for record in in_order) / max(1, sum(record["items"] for record in in_order))
    return {"loss": loss, **metrics.finish(in_order, data.labels)}


def _gathered(records: dict[int, Record], world: int) -> dict[int, Record]:
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, records)
    return {start: record for part in parts for start, record in part.items()}
