"""Fitting a new head and measuring every layer, in the way that the model is held."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from layerlens.integrations.weight_matrices import measurable_modules
from layerlens.jobs.inputs import statistics_request
from layerlens.jobs.memory_mode import CHECKPOINTED, checkpointed_activations
from layerlens.jobs.prepare import Prepared
from layerlens.models import ModelStatistics
from layerlens.profiling.head import fit_head
from layerlens.profiling.measure import measure_share
from layerlens.profiling.saved_pass import SavedPass
from layerlens.profiling.streamed.head import head_state, put_head, streamed_replay
from layerlens.profiling.streamed.measure import measure_streamed
from layerlens.utils.atomic import atomic_write_bytes
from layerlens.utils.processes import Processes
from layerlens.utils.progress import Progress

HEAD_BATCH_SIZE = 32
HEAD_FILE = "head.safetensors"


def fit_new_head(prepared: Prepared, progress: Progress, device: torch.device, streams: Path | None) -> None:
    """Fit the head where it is new.

    Args:
        prepared: the model; its head is fitted in place.
        progress: told of it.
        device: where blocks of a streamed model run.
        streams: of a streamed model, where the fitted head is kept until the profile is done; None for nowhere.
    """
    pretrained = prepared.pretrained
    if not (pretrained.new_parameters and len(prepared.head_data)):
        return
    batches = list(prepared.batches_of(prepared.head_data, HEAD_BATCH_SIZE))
    if pretrained.streamed is None:
        fit_head(pretrained.model, pretrained.new_parameters, batches, progress, prepared.task.loss)
        return
    kept = None if streams is None else streams / HEAD_FILE
    if kept is not None and put_head(pretrained.model, _tensors(kept), pretrained.new_parameters):
        return
    parent = None if streams is None else streams.parent
    with streamed_replay(
        pretrained.model, pretrained.streamed, pretrained.new_parameters, batches, parent, device
    ) as replay:
        fit_head(pretrained.model, pretrained.new_parameters, batches, progress, prepared.task.loss, replay)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(kept, save(head_state(pretrained.model, pretrained.new_parameters)))


def profile(
    prepared: Prepared,
    threads: int,
    progress: Progress,
    device: torch.device,
    saved: SavedPass | None,
    streams: Path | None,
    processes: Processes,
) -> ModelStatistics | None:
    """Measure every layer, together with the other processes; None in all but process 0.

    Args:
        prepared: the model.
        threads: for the kernels.
        progress: told of every batch.
        device: where blocks of a streamed model run.
        saved: where an unfinished pass is kept.
        streams: where an unfinished streamed profile is kept.
        processes: those that share the batches.
    """
    config, pretrained, spec = prepared.config, prepared.pretrained, prepared.spec
    settings: dict[str, Any] = {
        "request": statistics_request(config),
        "other_modules": measurable_modules(pretrained.model, spec) if config.profiling.all_weights else (),
        "sequence_length": config.data.max_length,
        "threads": threads,
        "progress": progress,
        "loss": prepared.task.loss,
    }
    if pretrained.streamed is not None:
        return measure_streamed(
            pretrained.model, pretrained.streamed, spec, prepared.batches, directory=streams, device=device, **settings
        )
    checkpointed = prepared.plan.mode == CHECKPOINTED
    with checkpointed_activations(pretrained.model) if checkpointed else nullcontext():
        return measure_share(pretrained.model, spec, prepared.batches, saved=saved, processes=processes, **settings)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return {}
