"""Tiny checkpoints on disk, each measured in memory and streamed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from brute_force import pieces
from test_architectures import CASES, Case, spec_of

from layerlens.integrations.skeleton import StreamedWeights, load_skeleton
from layerlens.integrations.weight_matrices import measurable_modules
from layerlens.models import ModelSpec
from layerlens.profiling.measure import measure
from layerlens.profiling.request import BY_SAMPLES, StatisticsRequest
from layerlens.profiling.statistics_file import statistics_to_bytes
from layerlens.profiling.streamed.measure_streamed import measure_streamed
from layerlens.tasks.batches import Batch
from layerlens.utils.progress import silent


class ClassItself:
    """Stands for a transformers Auto class where the model's class is known."""

    def __init__(self, model_class: Any) -> None:
        self.model_class = model_class

    def from_config(self, config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
        return self.model_class._from_config(config, dtype=dtype)


@dataclass
class Saved:
    """One model, in memory and as a checkpoint in several shards."""

    model: Any
    case: Case
    batches: list[Batch]
    spec: ModelSpec
    directory: Path

    def skeleton(self) -> tuple[Any, StreamedWeights]:
        found = load_skeleton(ClassItself(type(self.model)), self.directory, {}, self.model.dtype)
        return found[0].eval().requires_grad_(False), found[2]

    def settings(self, statistics: Any, *, everything: bool, progress: Any = silent) -> dict[str, Any]:
        return {
            "request": StatisticsRequest.of(statistics), "sequence_length": 6, "threads": 1, "progress": progress,
            "loss": self.case.loss, "other_modules": measurable_modules(self.model, self.spec) if everything else (),
        }  # fmt: skip

    def in_memory(self, statistics: Any = BY_SAMPLES, *, everything: bool = True) -> bytes:
        settings = self.settings(statistics, everything=everything)
        return statistics_to_bytes(self.spec, measure(self.model, self.spec, self.batches, **settings))

    def streamed(
        self, statistics: Any = BY_SAMPLES, *, everything: bool = True, progress: Any = silent, **more: Any
    ) -> bytes:
        skeleton, weights = self.skeleton()
        settings = self.settings(statistics, everything=everything, progress=progress)
        found = measure_streamed(skeleton, weights, self.spec, self.batches, **settings, **more)
        return statistics_to_bytes(self.spec, found)


def save(name: str, directory: Path, dtype: torch.dtype = torch.float32) -> Saved:
    """The model of a case, with uneven batches, one of a single sample."""
    case = CASES[name]
    torch.manual_seed(1)
    model: Any = case.make().to(dtype).eval()
    model.save_pretrained(directory, max_shard_size="4KB")
    # As a user loads it: `.to` rounds rotary frequencies, which from_pretrained keeps in float32.
    model = type(model).from_pretrained(directory, dtype=dtype).eval().requires_grad_(False)
    batch = case.batch()
    inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in batch.inputs.items()}
    labels = batch.labels.float() if batch.labels.is_floating_point() else batch.labels
    batch = dataclasses.replace(batch, inputs=inputs, labels=labels)
    return Saved(model, case, pieces(batch, 1, 3, 1), spec_of(model), directory)
