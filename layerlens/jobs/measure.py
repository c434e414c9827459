"""The second stage: every layer measured, in the way that the model is held; or its statistics out of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from layerlens.exceptions import ConfigurationError
from layerlens.integrations.placement import placed, shard, sharded
from layerlens.integrations.transformers import blocks_of
from layerlens.integrations.weight_matrices import measurable_modules
from layerlens.jobs.hours import SAMPLES
from layerlens.jobs.inputs import model_facts
from layerlens.jobs.job import Job, Warn
from layerlens.jobs.load import Loaded
from layerlens.jobs.memory_mode import CHECKPOINTED, checkpointed_activations
from layerlens.jobs.own_code import code_facts
from layerlens.jobs.own_step import with_own_step
from layerlens.jobs.recorded_step import with_step
from layerlens.jobs.solve import versions
from layerlens.jobs.together import same_everywhere
from layerlens.models import ModelFacts, ModelSpec, ModelStatistics
from layerlens.profiling.cache import cache_key
from layerlens.profiling.coupling import Coupling, Units, coupling, of_batches
from layerlens.profiling.head import fit_head, head_arrays, head_state, put_head, streamed_replay
from layerlens.profiling.measure import measure_share, refuse_by_samples
from layerlens.profiling.streamed.measure_streamed import measure_streamed
from layerlens.tasks import Batch, Loss
from layerlens.tasks.encoded import tokens_digest
from layerlens.tasks.losses import BatchLoss
from layerlens.utils.atomic import atomic_write_bytes
from layerlens.utils.processes import Processes

STATISTICS_VERSION = 12
"""Raise it whenever the same inputs give other statistics: cached ones are then measured again."""
HEAD_BATCH_SIZE = 32
HEAD_FILE = "head.safetensors"
BY_BATCHES = "each batch counts as one sample, so set data.batch_size to the batch size that you train with"
FEWEST_UNITS = 2
"""Batches that count as one sample each: two halves are compared."""


@dataclass(frozen=True)
class Measured:
    """What was measured of a model.

    Args:
        spec: its layers.
        statistics: of every layer.
        identity: everything that they depend on.
        model: what the manifest records of the model.
        from_cache: whether they were measured by an earlier run.
    """

    spec: ModelSpec
    statistics: ModelStatistics
    identity: dict[str, Any]
    model: ModelFacts
    from_cache: bool


def measure(job: Job, loaded: Loaded) -> Measured | None:
    """Measure every layer, together with the other processes, unless the cache has the statistics.

    Returns:
        what was measured; None in all processes but the first, whose shares are handed in.
    """
    processes, cache = job.processes, job.cache
    with job.clock.stage("profile"):
        identity = _identity_of_all(job.processes, statistics_identity(job, loaded), job.warnings.add)
        key = cache_key(identity)
        cached = cache.get(key) if cache and processes.first else None
        statistics = None if cached is None else _with_head(job, loaded, cached[1])
        if not processes.from_first("statistics in the cache", cached is not None):
            statistics = _measure(job, loaded, key)
        if not processes.first:
            _let_go(loaded.pretrained.model)
            return None
        assert statistics is not None
        if cached is not None and statistics.n_samples == len(loaded.batches) < len(loaded.calibration):
            job.warnings.add(f"the loss depends on the other samples in a batch: {BY_BATCHES}")
        spec = loaded.spec.without(statistics.unmeasured)
        model = model_facts(loaded.pretrained, job.config, loaded.dataset, spec)
        training_samples = len(loaded.dataset.split_test()[0])
        provenance: dict[str, Any] = {"identity": identity, "model": model.fields(), SAMPLES: training_samples}
        if not processes.alone:
            provenance["processes"] = processes.size
        heads = getattr(loaded, "heads", ()) or model.heads
        statistics = with_step(job, loaded, replace(statistics, provenance=provenance), heads)
        statistics = with_own_step(job, loaded, statistics, heads)
        if cache and (cached is None or (statistics.head and not cached[1].head)):
            cache.put(key, spec, statistics)
    return Measured(spec, statistics, identity, model, from_cache=cached is not None)


def _with_head(job: Job, loaded: Loaded, cached: ModelStatistics) -> ModelStatistics:
    """Cached statistics, and in the model the head that they were measured with, fitted again where they lack it."""
    pretrained = loaded.pretrained
    if not pretrained.new_parameters:
        return cached
    if put_head(pretrained.model, cached.head, pretrained.new_parameters):
        loaded.new_head.fitted = True
        return cached
    fit_new_head(job, loaded)
    return replace(cached, head=_head(loaded))


def _head(loaded: Loaded) -> dict[str, np.ndarray]:
    """The new task head as it is in the model; nothing where no head is new."""
    pretrained = loaded.pretrained
    if not pretrained.new_parameters:
        return {}
    modules = loaded.heads or pretrained.trained_modules()
    return head_arrays(pretrained.model, modules, pretrained.streamed)


def statistics_identity(job: Job, loaded: Loaded) -> dict[str, Any]:
    """Everything that the statistics depend on: the key of the sensitivity cache.

    Nothing is kept of objects in memory, so that their code is not read.
    """
    config, spec = job.config, loaded.spec
    settings: dict[str, Any] = {
        "task": loaded.task.name,
        "loss": config.model.loss,
        "dtype": config.model.dtype,
        "max_length": config.data.max_length,
        "max_target_length": config.data.max_target_length,
        "packing": config.data.packing,
        "source_prefix": config.data.source_prefix,
        "mlm_probability": config.data.mlm_probability,
        "batch_size": config.data.batch_size,
        "statistics": [statistic.identity for statistic in loaded.request.statistics],
        "ntk_samples": config.profiling.ntk_samples,
        "all_weights": config.profiling.all_weights,
        "seed": config.runtime.seed,
        "device": config.runtime.device,
        "threads": job.threads,
    }
    if loaded.plan.mode == CHECKPOINTED:  # the bytes that BERT keeps for a backward pass are counted otherwise
        settings["checkpointed"] = True
    if loaded.pretrained.tokens:  # what the fingerprint leaves out of them
        settings["tokens"] = loaded.pretrained.tokens.described()
    return {
        "version": STATISTICS_VERSION,
        "model": {"weights": spec.fingerprint, "layers": [[layer.name, *layer.methods] for layer in spec.layers]},
        "data": {
            "source": config.data.source,
            "calibration": loaded.calibration.fingerprint,
            "calibration_samples": len(loaded.calibration),
            "head": loaded.head_data.fingerprint,
            "head_samples": len(loaded.head_data),
            "tokens": tokens_digest(getattr(loaded.batches, "features", ())),
            **({"functions": loaded.functions} if loaded.functions else {}),
        },
        **({} if loaded.in_memory else code_facts(loaded)),
        "settings": settings,
        "versions": versions(),
    }


def _measure(job: Job, loaded: Loaded, key: str) -> ModelStatistics | None:
    """The statistics; None in all processes but the first."""
    config, pretrained = job.config, loaded.pretrained
    saved = job.cache.saved_pass(key, config.runtime.saving_time_share) if job.cache else None
    streams = job.cache.stream_directory(key) if job.cache else None
    fit_new_head(job, loaded, streams)
    for name in pretrained.new_parameters:
        job.processes.copy_from_first(pretrained.model.get_parameter(name).data)
    head = _head(loaded)
    batches, loss = by_batches_if_coupled(loaded, job.warnings.add)
    if config.distributed.sharding == "fsdp":
        shard(pretrained.model, blocks_of(pretrained.model), job.processes)
    other_modules = measurable_modules(pretrained.model, loaded.spec) if config.profiling.all_weights else ()
    settings: dict[str, Any] = {
        "request": loaded.request,
        "other_modules": other_modules,
        "sequence_length": config.data.max_length,
        "threads": job.threads,
        "progress": job.progress,
        "loss": loss,
    }
    if pretrained.streamed is not None:
        found = measure_streamed(
            pretrained.model, pretrained.streamed, loaded.spec, loaded.batches, directory=streams,
            device=torch.device(job.device), **settings,
        )  # fmt: skip
        return replace(found, head=head)
    checkpointed = loaded.plan.mode == CHECKPOINTED
    with checkpointed_activations(pretrained.model) if checkpointed else nullcontext():
        share = measure_share(
            pretrained.model, loaded.spec, batches, saved=saved, processes=job.processes,
            example=loaded.typical.inputs if loaded.example is None else loaded.example, **settings,
        )  # fmt: skip
    return None if share is None else replace(share, head=head)


def by_batches_if_coupled(loaded: Loaded, warn: Warn) -> tuple[Sequence[Batch], Loss | BatchLoss]:
    """The batches and the loss; where the loss of a sample depends on others in its batch, each batch as one sample.

    Raises:
        ConfigurationError: statistics of single samples are asked for then, or there are too few batches.
    """
    batches, loss = loaded.batches, loaded.task.loss
    known = loaded.pretrained.streamed is not None or isinstance(loss, BatchLoss) or not loaded.request.backward
    found = Coupling() if known else coupling(loaded.pretrained.model, batches, loss)
    if loaded.task.coupled and not isinstance(loss, BatchLoss):
        found = Coupling("it compares several samples")
    if found.random:
        warn("model.loss: the same samples have a different loss in every pass (it draws random numbers), so LayerLens "
             "cannot tell whether it depends on other samples in the batch; another data.batch_size gives other "
             "statistics")  # fmt: skip
    if not found.said:
        return batches, loss
    why = f"depends on the other samples in a batch ({found.said})"
    refuse_by_samples(loaded.request, "model.loss", why)
    if len(batches) < FEWEST_UNITS:
        raise ConfigurationError(
            f"data.batch_size: the loss {why}, so each batch counts as one sample, and there is only one batch; lower "
            "data.batch_size, or raise data.calibration_samples"
        )
    warn(f"model.loss {why}: {BY_BATCHES}")
    return Units(batches), of_batches(loss, "model.loss")


def _identity_of_all(processes: Processes, identity: dict[str, Any], warn: Warn) -> dict[str, Any]:
    """That of process 0, once all processes would measure the same.

    The user's code may know its rank, so what it is may differ where what is measured does not: a warning says so.
    """
    data = {name: one for name, one in identity.get("data", {}).items() if name != "functions"}
    told = {**{name: one for name, one in identity.items() if name != "code"}, "data": data}
    same_everywhere(processes, "identity", told)
    codes = processes.everyone("code", (identity.get("code"), identity.get("data", {}).get("functions")))
    if any(code != codes[0] for code in codes):
        warn(
            "the code of your functions, or what it refers to, is not the same in all processes (it may know its "
            "rank); make sure that all machines have the same version"
        )
    first: dict[str, Any] = processes.from_first("identity of all", identity)
    return first


def fit_new_head(job: Job, loaded: Loaded, streams: Path | None = None) -> None:
    """Fit the task head that the model lacks, unless that is done: gradients through a random head say nothing.

    Args:
        job: the job.
        loaded: the model; its head is fitted in place.
        streams: of a streamed model, where the fitted head is kept until the profile is done; None for nowhere.
    """
    pretrained, loss = loaded.pretrained, loaded.task.loss
    model, new = pretrained.model, pretrained.new_parameters
    if loaded.new_head.fitted or not (new and len(loaded.head_data)):
        return
    batches = list(loaded.batches_of(job, loaded.head_data, HEAD_BATCH_SIZE))
    kept = None if streams is None else streams / HEAD_FILE
    if pretrained.streamed is None:
        fit_head(model, new, batches, job.progress, loss)
    elif kept is None or not put_head(model, _tensors(kept), new):
        parent = None if streams is None else streams.parent
        with streamed_replay(model, pretrained.streamed, new, batches, parent, torch.device(job.device)) as replay:
            fit_head(model, new, batches, job.progress, loss, replay)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(kept, save(head_state(model, new)))
    loaded.new_head.fitted = True


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return {}


def _let_go(model: torch.nn.Module) -> None:
    """Free the memory of a model whose share is measured; it is only held while this process waits."""
    if not placed(model) and not sharded(model):
        with suppress(RuntimeError, NotImplementedError, ValueError):
            model.to("meta")
