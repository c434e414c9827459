"""The model, its layers and its calibration batches, held in memory as ``profiling.memory_mode`` says."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from layerlens.config import RunConfig
from layerlens.data import Dataset
from layerlens.exceptions import ConfigurationError, ModelSpecError
from layerlens.integrations.layers import model_spec
from layerlens.integrations.placement import placed
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.jobs.inputs import check_lengths, split_samples, statistics_request
from layerlens.jobs.memory_mode import (
    PLAIN,
    STREAMED,
    MemoryPlan,
    asked_mode,
    choose_mode,
    plan_as_asked,
    predict_memory,
    reason_of,
    refuse_streaming_of,
)
from layerlens.jobs.messages import Warnings
from layerlens.jobs.together import refuse_untrainable
from layerlens.models import ModelSpec
from layerlens.registry import source_of
from layerlens.sources import load_pretrained
from layerlens.tasks import Batches, Task, make_batches
from layerlens.utils.processes import Processes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A model ready to be measured.

    Args:
        pretrained: the model; of a streamed one the skeleton.
        dataset: all samples, with labels in the model's order.
        calibration, head_data, held_out: parts of it.
        batches: the calibration samples.
        spec: the layers.
        plan: how the model is held while it is measured.
        config, task: what they were made for.
    """

    pretrained: PretrainedModel
    dataset: Dataset
    calibration: Dataset
    head_data: Dataset
    held_out: Dataset
    batches: Batches
    spec: ModelSpec
    plan: MemoryPlan
    config: RunConfig
    task: Task

    def batches_of(self, samples: Dataset, batch_size: int | None = None) -> Batches:
        """Samples as batches, of ``data.batch_size`` unless given."""
        data = self.config.data
        size = batch_size or data.batch_size
        return make_batches(self.task, self.pretrained, samples, data, batch_size=size, seed=self.config.runtime.seed)


def prepare(
    config: RunConfig,
    base_dir: Path,
    dataset: Dataset,
    task: Task,
    device: torch.device,
    warnings: Warnings,
    processes: Processes,
    placement: Mapping[str, Any] | None,
) -> Prepared:
    """Load the model as it is to be held, and cut the data.

    Args:
        config: the whole job.
        base_dir: folder that relative paths start from.
        dataset, task: what the model is measured on.
        device: where a model that is in memory whole goes.
        warnings: told of what the user should know.
        processes: those that share the work; a streamed model has one.
        placement: where accelerate puts the modules (``model.device_map``).

    Raises:
        LayerLensError: with one line that says what to do.
    """
    mode = asked_mode(config)
    if mode != PLAIN:
        _refuse_spread(config, processes)
    if mode is not None:
        if mode == STREAMED:
            refuse_streaming_of(config)
        return _load(config, base_dir, dataset, task, device, warnings, plan_as_asked(config), placement)
    refused: dict[str, str] = {}
    on_disk = MemoryPlan(STREAMED, "", {})
    skeleton = None
    if reason := source_of(config.model.reference)[0].why_not_streamable(config.model.reference):
        refused[STREAMED] = reason
    else:
        try:
            skeleton = _load(config, base_dir, dataset, task, device, Warnings(lambda line: None), on_disk)
        except ModelSpecError as error:
            if error.exit_code != ModelSpecError.exit_code:  # the model is not there, or damaged
                raise
            refused[STREAMED] = reason_of(error)
    found = skeleton or _load(config, base_dir, dataset, task, device, warnings, MemoryPlan(PLAIN, "", {}))
    predicted = predict_memory(
        found.pretrained, found.spec, found.batches, statistics_request(config), config.data.max_length
    )
    plan = choose_mode(config, predicted, refused)
    log.info("%s", plan.told())
    if plan.mode == STREAMED:
        refuse_streaming_of(config)
    elif skeleton is not None:
        return _load(config, base_dir, dataset, task, device, warnings, plan)
    return replace(found, plan=plan)


def _refuse_spread(config: RunConfig, processes: Processes) -> None:
    """Memory is limited for one process with the whole model; a model that is spread has other ways."""
    key = "max_memory_gb" if config.profiling.memory_mode == "auto" else "memory_mode"
    if not processes.alone:
        raise ConfigurationError(
            f"profiling.{key}: for one process; with several give distributed.sharding: fsdp, or start one"
        )
    if config.model.device_map is not None:
        raise ConfigurationError(f"profiling.{key}: not together with model.device_map; give one of the two")


def _load(
    config: RunConfig, base_dir: Path, dataset: Dataset, task: Task, device: torch.device, warnings: Warnings,
    plan: MemoryPlan, placement: Mapping[str, Any] | None = None,
) -> Prepared:  # fmt: skip
    pretrained = load_pretrained(
        config.model.reference,
        config.model.task,
        dataset.label_names,
        seed=config.runtime.seed,
        base_dir=base_dir,
        dtype=config.model.dtype,
        weights=config.model.weights,
        placement=placement,
        streamed=plan.mode == STREAMED,
    )
    check_lengths(pretrained, config)
    refuse_untrainable(pretrained.model, config)
    if dataset.label_names:
        dataset = dataset.with_label_order(pretrained.labels)
    if pretrained.streamed is None and not placed(pretrained.model):
        pretrained.model.to(device)
    calibration, head_data, held_out = split_samples(dataset, config, warnings)
    batches = make_batches(
        task, pretrained, calibration, config.data, batch_size=config.data.batch_size, seed=config.runtime.seed
    )
    inputs = batches[0].inputs
    spec = model_spec(
        pretrained,
        config.model.reference,
        adapter_sites=config.profiling.adapter_sites,
        inputs=None if "input_ids" in inputs else inputs,
    )
    return Prepared(pretrained, dataset, calibration, head_data, held_out, batches, spec, plan, config, task)
