"""What the user's code is, for the keys of all that a job keeps; what cannot be told apart is not kept."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from layerlens.integrations.model_code import model_code
from layerlens.jobs.job import Warn
from layerlens.jobs.load import Loaded
from layerlens.jobs.repeated import UNUSED
from layerlens.profiling.cache import SensitivityCache
from layerlens.registry import METHODS
from layerlens.tasks import Task
from layerlens.utils.code_identity import CodeIdentity

MOST_NAMED = 3


def code_of(loaded: Loaded) -> CodeIdentity:
    """The code that statistics and short trainings depend on: of the model, its loss, inputs, statistics, methods."""
    methods = {name: METHODS[name] for layer in loaded.spec.layers for name in layer.methods}
    others = {
        **task_parts(loaded.task),
        **loaded.pretrained.transforms,
        "the statistics": list(loaded.request.statistics),
        "the methods": [methods[name] for name in sorted(methods)],
    }
    return model_code(loaded.pretrained.model, others)


def code_facts(loaded: Loaded) -> dict[str, str]:
    """What the code is, and what it makes of the first samples, as part of a key."""
    return {"code": code_of(loaded).digest, "inputs": inputs_digest(loaded.batches[0].inputs)}


def task_parts(task: Task) -> dict[str, Any]:
    """What a task does with samples and outputs, by the name that messages use."""
    return {"the task": task.name, "model.loss": task.loss, "encode": task.encode, "collate": task.collate}


def usable_cache(cache: SensitivityCache | None, loaded: Loaded, warn: Warn) -> SensitivityCache | None:
    """The cache; None, with a warning, where code cannot be told from another version of it."""
    unknown = code_of(loaded).unknown if cache is not None else {}
    if unknown:
        warn(f"{UNUSED}, because {told(unknown)}")
        return None
    return cache


def told(unknown: Mapping[str, str]) -> str:
    """What could not be read, as part of a sentence."""
    named = [f"{where} has {what}" for where, what in list(unknown.items())[:MOST_NAMED]]
    more = f" (and {len(unknown) - MOST_NAMED} more)" if len(unknown) > MOST_NAMED else ""
    return f"{'; '.join(named)}{more}; a change of it could not be noticed"


def inputs_digest(inputs: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the tensors of a batch: how images and the user's own samples become inputs is seen in them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(inputs.items()):
        if isinstance(tensor, torch.Tensor):
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{name}:{tensor.dtype}{tuple(tensor.shape)};".encode())
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
