"""The first stage: the model, its layers and its data, held in memory as ``profiling.memory_mode`` says."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlens.config import DataConfig, RunConfig
from layerlens.config.compatibility import refuse_conflicts, refuse_streaming
from layerlens.data import Dataset, load_dataset
from layerlens.data.labels import HEAD_ADVICE, in_order_of
from layerlens.exceptions import ModelSpecError
from layerlens.integrations.layers import model_spec, of_tokens_alone
from layerlens.integrations.named_heads import note_of_fresh
from layerlens.integrations.peft_calls import told_of_keywords
from layerlens.integrations.placement import placed, placement_arguments
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.jobs.inputs import calibration_samples, check_model, functions_of, split_samples, statistics_request
from layerlens.jobs.job import Job, Warnings
from layerlens.jobs.memory_mode import (
    PLAIN,
    STREAMED,
    MemoryPlan,
    choose_mode,
    plan_as_asked,
    predict_memory,
    reason_of,
)
from layerlens.models import ModelSpec
from layerlens.models.data_summary import DataSummary
from layerlens.optimization.constraints import without_idle_layers
from layerlens.profiling.request import StatisticsRequest
from layerlens.sources import load_pretrained
from layerlens.tasks import Batch, Batches, Task, make_batches, task_for
from layerlens.tasks.batches import untaken_note
from layerlens.tasks.encoded import notes_of
from layerlens.tasks.summary import summarise
from layerlens.tasks.token_ids import told_of_tokens

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


@dataclass
class NewHead:
    """Whether the task head that the pretrained model lacks is fitted already; one is fitted once."""

    fitted: bool = False


@dataclass(frozen=True)
class Loaded:
    """A model ready to be measured.

    Args:
        pretrained: the model; of a streamed one the skeleton.
        dataset: all samples, with labels in the model's order.
        calibration, head_data, held_out: parts of it.
        batches: the calibration samples.
        spec: the layers.
        plan: how the model is held while it is measured.
        task: what it is measured for.
        request: what is measured.
        new_head: whether the task head that the model lacks is fitted already.
        example: what the model takes, without targets, where the inputs of a batch are something else.
        functions: digest of the user's functions that the configuration names; "" where it names none.
        heads: modules of a new head, where they are known otherwise than from the parameters that a checkpoint lacks.
    """

    pretrained: PretrainedModel
    dataset: Dataset
    calibration: Dataset
    head_data: Dataset
    held_out: Dataset
    batches: Sequence[Batch]
    spec: ModelSpec
    plan: MemoryPlan
    task: Task
    request: StatisticsRequest
    new_head: NewHead = field(default_factory=NewHead)
    example: Mapping[str, torch.Tensor] | None = None
    functions: str = ""
    heads: tuple[str, ...] = ()

    @property
    def in_memory(self) -> bool:
        """Whether a program gave the objects, of which nothing is kept between runs."""
        return False

    @property
    def typical(self) -> Batch:
        """The batch that costs are counted on."""
        return self.batches.typical if isinstance(self.batches, Batches) else self.batches[0]

    def summary(self, config: DataConfig) -> DataSummary | None:
        """What was read, and one sample as the model sees it; None where the data came as batches."""
        if not isinstance(self.batches, Batches):
            return None
        return summarise(self.task, self.pretrained, self.dataset, self.calibration, self.batches, config)

    def batches_of(self, job: Job, samples: Dataset, batch_size: int | None = None) -> Batches:
        """Samples as batches, of ``data.batch_size`` unless given."""
        data, seed = job.config.data, job.config.runtime.seed
        size = batch_size or data.batch_size
        batches = make_batches(
            self.task, self.pretrained, samples, data, batch_size=size, seed=seed, limit=len(samples)
        )
        if self.task.reference is not None and self.pretrained.streamed is None:
            self.task.reference(self.pretrained.model, self.pretrained, batches.features, size)
        return batches


def load(job: Job) -> Loaded:
    """Load the data and the model as it is to be held.

    Raises:
        LayerLensError: with one line that says what to do.
    """
    config = job.config
    functions = functions_of(config.model, config.data, job.base_dir)
    with job.clock.stage("load"), job.progress.stage("Loading model and data"):
        placement = placement_arguments(config.model.device_map, config.model.max_memory, config.model.offload_folder)
        dataset = load_dataset(config.data, job.base_dir, config.model.task)
        made = partial(_load, job, dataset, functions="" if functions is None else functions.digest)
        plan = plan_as_asked(config.profiling)
        if plan is not None:
            return made(plan, placement=placement)
        refused: dict[str, str] = {}
        skeleton, unsaid = None, Warnings()
        reason = config.model.source.why_not_streamable(config.model.reference)
        if config.model.quantization is not None:
            reason = "model.quantization: weights are streamed as they lie on disk"
        if config.model.token_request:
            reason = "model.resize_token_embeddings, model.trainable_tokens: rows of embeddings are trained in memory"
        if reason:
            refused[STREAMED] = reason
        else:
            try:
                skeleton = made(MemoryPlan(STREAMED, "", {}), warnings=unsaid)
            except ModelSpecError as error:
                if error.exit_code != ModelSpecError.exit_code:  # the model is not there, or damaged
                    raise
                refused[STREAMED] = reason_of(error)
        loaded = skeleton or made(MemoryPlan(PLAIN, "", {}))
        predicted = predict_memory(
            loaded.pretrained, loaded.spec, loaded.batches, loaded.request, config.data.max_length
        )
        plan = choose_mode(config, predicted, refused)
        log.info("%s", plan.told())
        if plan.mode == STREAMED:
            refuse_streaming(config)
            for line in unsaid.lines:
                job.warnings.add(line)
        elif skeleton is not None:
            return made(plan)
        return replace(loaded, plan=plan)


def _load(
    job: Job, dataset: Dataset, plan: MemoryPlan, placement: dict[str, Any] | None = None,
    warnings: Warnings | None = None, functions: str = "",
) -> Loaded:  # fmt: skip
    config = job.config
    task = task_for(config.model, job.base_dir, dataset)
    pretrained = load_pretrained(
        config.model.reference,
        config.model.task,
        dataset.outputs,
        seed=config.runtime.seed,
        base_dir=job.base_dir,
        dtype=config.model.dtype,
        weights=config.model.weights,
        placement=placement,
        streamed=plan.mode == STREAMED,
        new_head=config.model.new_head,
        trust_remote_code=config.model.trust_remote_code,
        quantization=config.model.quantization,
        tokens=config.model.token_request or None,
        heads=config.model.head,
    )
    check_model(pretrained, config)
    dataset = in_order_of(dataset, pretrained.labels, advice=HEAD_ADVICE)
    if pretrained.streamed is None and not placed(pretrained.model):
        pretrained.model.to(job.device)
    heard = warnings or job.warnings
    fresh = note_of_fresh(pretrained) if config.model.factory and config.model.head is None else ""
    for line in (*pretrained.notes, *told_of_tokens(pretrained), *([fresh] if fresh else [])):
        heard.add(line)
    for name in pretrained.drawn:
        heard.add(
            f"model: the checkpoint lacks {name}, which is not trained; it keeps its random initialisation from "
            "the seed"
        )
    calibration, head_data, held_out = split_samples(dataset, config, heard, bool(pretrained.new_parameters))
    batches = make_batches(
        task, pretrained, calibration, config.data, batch_size=config.data.batch_size, seed=config.runtime.seed,
        limit=max(len(calibration), calibration_samples(config, len(dataset))),
    )  # fmt: skip
    if task.reference is not None and (config.profiling.proxies.options or config.optimization.proxy_check.steps):
        task.reference(pretrained.model, pretrained, batches.features, config.data.batch_size)
    for line in (*dataset.notes, *notes_of(batches.features)):
        heard.add(line)
    inputs = batches.typical.inputs
    for name in batches.untaken:
        heard.add(untaken_note(pretrained.model, name))
    spec = model_spec(
        pretrained,
        config.model.reference,
        adapter_sites=config.profiling.adapter_sites,
        inputs=None if of_tokens_alone(inputs) else inputs,
        only=config.profiling.layers,
        methods=config.optimization.methods,
    )
    spec = without_idle_layers(spec, config.optimization.constraints.rules)
    if not config.model.source.of_transformers and pretrained.streamed is None:
        for line in told_of_keywords(pretrained.model, [layer.name for layer in spec.layers], inputs):
            heard.add(line)
    request = statistics_request(config)
    return Loaded(pretrained, dataset, calibration, head_data, held_out, batches, spec, plan, task, request,
                  functions=functions)  # fmt: skip


def summary_of(config: RunConfig, base_dir: Path) -> DataSummary | None:
    """What a run would read, and one sample as the model would see it; weights stay on disk where they can.

    Raises:
        LayerLensError: see ``load``.
    """
    refuse_conflicts(config, "run")
    job = Job(config, base_dir, base_dir)
    dataset = load_dataset(config.data, base_dir, config.model.task)
    mode = PLAIN if config.model.source.why_not_streamable(config.model.reference) else STREAMED
    try:
        loaded = _load(job, dataset, MemoryPlan(mode, "", {}))
    except ModelSpecError as error:
        if mode == PLAIN or error.exit_code != ModelSpecError.exit_code:
            raise
        loaded = _load(job, dataset, MemoryPlan(PLAIN, "", {}))
    return loaded.summary(config.data)
