"""Checkpoints of a fine-tune: what trains, and everything else that the next step depends on.

A checkpoint is a directory ``checkpoint-STEP`` whose last file, ``progress.json``, says that it is whole; a run that
is killed while it writes one leaves a directory without that file, which nobody goes on from. Only what trains is kept
(and buffers, such as running means); frozen weights come from the base model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from layerlens.exceptions import TrainingError
from layerlens.faults import CheckpointFault
from layerlens.utils.atomic import atomic_write_bytes, atomic_write_text

WEIGHTS_FILE, PROGRESS_FILE, HOOKS_FILE, JOB_FILE = "trained.safetensors", "progress.json", "hooks.pt", "job.json"
_PREFIX = "checkpoint-"


def trained_tensors(model: torch.nn.Module, names: Collection[str]) -> dict[str, torch.Tensor]:
    """The parameters in ``names`` and all buffers that a state dict has."""
    wanted = set(names)
    parameters = dict(model.named_parameters())
    return {
        name: tensor.detach()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name in wanted or name not in parameters
    }


def save_weights(model: torch.nn.Module, names: Collection[str], path: Path) -> None:
    """Write ``trained_tensors`` to ``path`` in one step.

    Raises:
        OutputError: the file cannot be written, or the disk is full.
    """
    # Copies: two names of one tensor are refused by safetensors, and views would drag their whole storage along.
    tensors = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in
               trained_tensors(model, names).items()}  # fmt: skip
    atomic_write_bytes(path, save(tensors))


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Put what ``save_weights`` wrote back into ``model``.

    Raises:
        TrainingError: the file cannot be read, or is of another model.
    """
    own = model.state_dict(keep_vars=True)
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                tensor = file.get_tensor(name)
                if name not in own or own[name].shape != tensor.shape:
                    raise TrainingError(f"{path}: {name} {tuple(tensor.shape)} has no place in this model").of(
                        CheckpointFault.FIT
                    )
                own[name].copy_(tensor)
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path}: cannot be read ({error}); train again with --restart").of(
            CheckpointFault.UNREADABLE
        ) from error


def checkpoint_path(directory: Path, step: int) -> Path:
    """The directory of the checkpoint after ``step`` optimiser steps."""
    return directory / f"{_PREFIX}{step}"


def last_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint below ``directory`` that is whole."""
    whole = [path.parent for path in directory.glob(f"{_PREFIX}*/{PROGRESS_FILE}")]
    return max(whole, key=_step, default=None)


def finish_checkpoint(path: Path, progress: Mapping[str, Any], keep: Collection[str]) -> None:
    """Mark ``path`` as whole, and remove all other checkpoints and every best file that is not in ``keep``."""
    atomic_write_text(path / PROGRESS_FILE, json.dumps(progress))
    for other in path.parent.glob(f"{_PREFIX}*"):
        if other != path:
            _remove(other)
    for best in path.parent.glob("best-*.safetensors"):
        if best.name not in keep:
            best.unlink()


def remove_checkpoints(directory: Path) -> None:
    """Remove the directory with all checkpoints in it; a run that is killed meanwhile leaves none to continue from."""
    for checkpoint in directory.glob(f"{_PREFIX}*"):
        _remove(checkpoint)
    shutil.rmtree(directory, ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    (checkpoint / PROGRESS_FILE).unlink(missing_ok=True)  # first: what is half removed is no checkpoint
    shutil.rmtree(checkpoint, ignore_errors=True)


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """What ``finish_checkpoint`` wrote."""
    path = checkpoint / PROGRESS_FILE
    try:
        progress: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        message = f"{path}: cannot be read ({error}); train again with --restart"
        raise TrainingError(message).of(CheckpointFault.UNREADABLE) from error
    return progress


def check_job(directory: Path, job: Mapping[str, Any]) -> None:
    """Refuse to continue with the checkpoints of another job; a directory without any is marked as this job's.

    Raises:
        TrainingError: what differs, by name.
        OutputError: the directory cannot be written.
    """
    path = directory / JOB_FILE
    mine = json.loads(json.dumps(job))
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        there = None
    if there is not None and there != mine and last_checkpoint(directory) is not None:
        differs = sorted(key for key in {*there, *mine} if there.get(key) != mine.get(key))
        told = "; ".join(f"{key}: {_short(there.get(key))} there, {_short(mine.get(key))} here" for key in differs)
        raise TrainingError(
            f"{directory} has checkpoints of another job ({told}); train with --restart to remove them, or choose "
            "another output directory"
        ).of(CheckpointFault.OTHER_JOB)
    if there != mine:
        atomic_write_text(path, json.dumps(mine, indent=2, sort_keys=True) + "\n")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _step(path: Path) -> int:
    number = path.name.removeprefix(_PREFIX)
    return int(number) if number.isdigit() else -1
