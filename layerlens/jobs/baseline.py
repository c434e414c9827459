"""A baseline in place of a manifest's choice: the same model, data, order and number of trained parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch

from layerlens.config import RunConfig
from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.models import Manifest
from layerlens.tuning.baselines import BaselineRequest, Finished, Prepared, known_baseline
from layerlens.tuning.fine_tune import processes
from layerlens.tuning.samples import SeededOrder, TrainingData, on_device
from layerlens.tuning.steps import total_steps

Batch = dict[str, Any]


def prepare_baseline(
    name: str, pretrained: PretrainedModel, manifest: Manifest, data: TrainingData, config: RunConfig, seed: int
) -> Prepared:
    """The baseline ``name`` with as many trained parameters as the manifest's options have, as near as it can.

    Args:
        name: one of ``BASELINES``.
        pretrained: the base model; it is changed in place.
        manifest: says how many parameters, and what the task head is.
        data: what is trained on.
        config: adapter sites, learning rate and steps.
        seed: of the data order and of new weights.

    Raises:
        ConfigurationError: unknown baseline, or it cannot be had for this model, budget or data.
    """
    request = BaselineRequest(
        model=pretrained.model,
        spec=model_spec(
            pretrained,
            manifest.model.name_or_path or "",
            adapter_sites=config.profiling.adapter_sites,
            only=config.profiling.layers,
        ),
        facts=manifest.model,
        budget=manifest.trainable_params,
        batches=FirstEpoch(data, config.training.batch_size, seed, next(pretrained.model.parameters()).device),
        total_steps=total_steps(len(data.train), config.training, processes()[0]),
        seed=seed,
        alpha_over_r=float(manifest.lora.alpha_over_r or config.optimization.alpha_over_r),
        learning_rate=config.training.learning_rate,
        loss=lambda model, batch: data.output(model, batch).loss,
    )
    return known_baseline(name).prepare(request)


def baseline_facts(name: str, manifest: Manifest, prepared: Prepared, finished: Finished) -> dict[str, Any]:
    """What metrics.json says of a baseline."""
    options = finished.choice.chosen if finished.choice else ()
    return {
        "name": name,
        "note": prepared.note,
        "budget_params": manifest.trainable_params,
        "trained_params": prepared.trained_params,
        "kept_params": finished.kept_params,
        "options": {option.layer: [option.method, option.rank] for option in options},
    }


class FirstEpoch(Sequence[Batch]):
    """The batches of the first epoch as training will see them, each made when it is asked for."""

    def __init__(self, data: TrainingData, batch_size: int, seed: int, device: torch.device) -> None:
        self.data, self.device = data, device
        order = list(SeededOrder(len(data.train), seed))
        self.parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def __len__(self) -> int:
        return len(self.parts)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        batch = self.data.collate([self.data.train[sample] for sample in self.parts[index]])
        return on_device(batch, self.device)
