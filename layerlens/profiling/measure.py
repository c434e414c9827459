"""The profile of a model: its statistics from one pass over the calibration batches."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from layerlens.exceptions import ConfigurationError, ProfilingError
from layerlens.integrations.placement import input_device, sharded
from layerlens.integrations.quantized import parameter_count, quantized_layers, weight_count
from layerlens.integrations.torch_modules import frozen_without_dropout
from layerlens.integrations.transformers import blocks_of, without_cache
from layerlens.integrations.weight_matrices import uncompiled, why_not_measurable
from layerlens.models import ModelSpec, ModelStatistics, ModuleCosts
from layerlens.models.model_spec import EMBEDDING
from layerlens.profiling.accumulators import LayerRows, SumShards
from layerlens.profiling.capture import Capture, none_measured
from layerlens.profiling.coupling import Units
from layerlens.profiling.finite import refuse_non_finite
from layerlens.profiling.footprint import dense_inputs, frozen_footprint
from layerlens.profiling.pass_sums import BatchRecord, Key, Ledger
from layerlens.profiling.request import StatisticsRequest
from layerlens.profiling.saved_pass import SavedPass, gather
from layerlens.profiling.statistics import ModelSums, Statistic
from layerlens.profiling.trial import Trial, tried
from layerlens.tasks import Batch, Batches, Loss
from layerlens.tasks.batches import Inputs
from layerlens.tasks.losses import BatchLoss, classification_loss
from layerlens.utils.processes import ALONE, Processes
from layerlens.utils.progress import Progress


def measure(
    model: torch.nn.Module,
    spec: ModelSpec,
    batches: Sequence[Batch],
    *,
    request: StatisticsRequest,
    sequence_length: int,
    threads: int,
    progress: Progress,
    loss: Loss | BatchLoss = classification_loss,
    other_modules: Sequence[str] = (),
    saved: SavedPass | None = None,
    example: Mapping[str, torch.Tensor] | None = None,
) -> ModelStatistics:
    """Measure every layer of ``spec`` on ``batches``.

    Args:
        model: measured with dropout off; its modes and flags are as before afterwards. A `torch.compile`d model is
            measured through the module it was compiled from, which has the same weights.
        spec: the layers to measure.
        batches: the calibration data; results do not depend on how it is cut into batches (to rounding).
        request: which statistics.
        sequence_length: tokens of the sequences for which memory and FLOPs are counted.
        threads: for the kernels; torch's own threads are set by the caller.
        progress: called after every batch.
        loss: the loss of each sample, or of a batch, which then counts as one sample.
        other_modules: modules outside the layers whose weights are measured too (``measurable_modules``).
        saved: where the pass is kept after batches, and taken up again if an earlier one was interrupted.
        example: what the model takes, for its costs, if that is not the inputs of the first batch.

    Raises:
        ProfilingError: a loss or a statistic is not finite, or a layer cannot be measured; names the layer.
    """
    found = measure_share(
        model, spec, batches, request=request, sequence_length=sequence_length, threads=threads, progress=progress,
        loss=loss, other_modules=other_modules, saved=saved, processes=ALONE,
        example=example,
    )  # fmt: skip
    assert found is not None
    return found


def measure_share(
    model: torch.nn.Module,
    spec: ModelSpec,
    batches: Sequence[Batch],
    *,
    request: StatisticsRequest,
    sequence_length: int,
    threads: int,
    progress: Progress,
    loss: Loss | BatchLoss,
    other_modules: Sequence[str],
    saved: SavedPass | None,
    processes: Processes,
    example: Mapping[str, torch.Tensor] | None = None,
) -> ModelStatistics | None:
    """This process's share of ``measure``: process 0 has the statistics of all batches in the end, the others None.

    Every process is given all batches and measures every ``processes.size``-th of them. ``example`` is what the model
    takes, for its costs, if that is not the inputs of the first batch.

    Raises:
        ConfigurationError: there are more processes than batches, or a statistic of single samples is wanted and the
            loss is of whole batches.
        ProcessLostError: another process failed or is lost.
    """
    model = uncompiled(model)
    by_batches = isinstance(loss, BatchLoss)
    if isinstance(loss, BatchLoss) and not loss.of_samples:
        refuse_by_samples(request, loss.name)
    example = batches[0].inputs if example is None else dict(example)
    before = _samples_before(batches)
    n_samples = before[-1]
    request = dataclasses.replace(request, ntk_samples=min(request.ntk_samples, n_samples))
    ledger = Ledger()
    with frozen_without_dropout(model, checkpointing=True), without_cache(model):
        shards = SumShards(processes) if sharded(model) else None
        capture = Capture(model, spec, request, threads, other_modules, shards, by_batches)
        trial = tried(model, spec, other_modules, batches) if request.backward and not by_batches else Trial()
        one_by_one = trial.apply_to(capture, sharded=sharded(model))
        sums, device = capture.sums, input_device(model)
        share = _share(processes, len(batches))
        with progress.stage("Measuring gradients", total=len(share)) as advance, capture.open():
            done = saved.restore(sums, ledger, device, processes) if saved else set()
            left = [number for number in share if number not in done]
            advance(len(share) - len(left))
            # All processes make the passes of a model that is spread over them, also those that have no batch left.
            rounds = max(processes.everyone("batches left", len(left))) if sharded(model) else 0
            for number in left:  # each is made once, and not kept
                batch = batches[number].halves_apart()
                ledger.take(sums, number, batch, capture.run_parts(batch, loss, before[number], one_by_one=one_by_one))
                if saved:
                    saved.after_batch(sums, ledger)
                processes.check()
                advance(1)
            for _ in range(rounds - len(left)):
                capture.run(batches[0], loss, counted=False)
        gather(sums, ledger, processes, device)
        if not processes.first:
            if sharded(model):
                _costs(model, spec, example, sequence_length, request)
            return None
        ledger.put_back(sums)
        with progress.stage("Computing statistics", total=None):
            layers = capture.result()
            others = capture.other_weights()
            of_model = model_results(request, sums.parts(spec.layers), sums.rows, ledger.in_order())
        covered = capture.covered_weights()
    activation_bytes, forward_flops, modules = _costs(model, spec, example, sequence_length, request)
    left_out, coverage = left_out_of(model, covered)
    statistics = ModelStatistics(
        layers=layers,
        n_samples=n_samples,
        n_tokens=ledger.n_tokens,
        mean_loss=float(torch.cat([record.losses for record in ledger.in_order()]).double().mean()),
        activation_bytes=activation_bytes,
        forward_flops=forward_flops,
        other_weights=others,
        left_out=left_out | capture.unmeasured_weights(),
        unmeasured=capture.unmeasured_layers(),
        coverage=coverage,
        modules=modules,
        **of_model,
    )
    refuse_nothing_measured(statistics, spec)
    refuse_non_finite(statistics)
    return statistics


def _costs(
    model: torch.nn.Module, spec: ModelSpec, example: Inputs, sequence_length: int, request: StatisticsRequest
) -> tuple[float, float, dict[str, ModuleCosts]]:
    """(activation bytes, forward FLOPs) of the model for a token, and the costs of its modules."""
    with frozen_without_dropout(model, checkpointing=False), without_cache(model):
        inputs = dense_inputs(example, sequence_length, model=model)
        embeddings = [layer.name for layer in spec.layers if layer.layer_type == EMBEDDING]
        embeddings += spec.tokens.modules[:1] if spec.tokens else []
        first_block = next(iter((*embeddings, *blocks_of(model))), None)
        activation_bytes, forward_flops = frozen_footprint(model, first_block, inputs)
        return activation_bytes, forward_flops, module_costs(model, first_block, inputs, request.of_modules)


def refuse_by_samples(request: StatisticsRequest, loss: str, why: str = "is one number for a whole batch") -> None:
    """Refuse, by name, statistics of single samples, which a loss of whole batches does not have.

    Raises:
        ConfigurationError: names the statistics.
    """
    asked = [one.name for one in request.statistics if one.by_samples]
    if asked:
        raise ConfigurationError(
            f"profiling.statistics: {', '.join(asked)} need the loss of each sample, and {loss} {why}; leave them "
            "out and choose a utility model without them, such as auto"
        )


def refuse_nothing_measured(statistics: ModelStatistics, spec: ModelSpec) -> None:
    """Raise ProfilingError where a model has layers and none of them could be measured; shows the first reasons."""
    if spec.layers and not statistics.layers:
        raise ProfilingError(none_measured(statistics.unmeasured))


def _share(processes: Processes, n_batches: int) -> range:
    if processes.size > n_batches:
        raise ConfigurationError(
            f"{processes.size} processes for {n_batches} batches of calibration samples; start at most {n_batches}, or "
            "lower data.batch_size"
        )
    return processes.share_of(range(n_batches))


def _samples_before(batches: Sequence[Batch]) -> list[int]:
    """Samples in all batches before each of them, and in all of them at the end."""
    plan = batches.plan if isinstance(batches, (Batches, Units)) else [batch.index for batch in batches]
    return [0, *itertools.accumulate(map(len, plan))]


def model_results(
    request: StatisticsRequest, parts: Mapping[str, Mapping[Key, np.ndarray]], rows: LayerRows,
    records: Sequence[BatchRecord],
) -> dict[str, Any]:  # fmt: skip
    """Fields of ``ModelStatistics`` that statistics of the model fill, ``extra`` among them.

    Args:
        request: which statistics.
        parts: see ``PassSums.parts``.
        rows: what was added up over the layers.
        records: of the batches, in their order.
    """
    index, labels = [record.index for record in records], [record.labels for record in records]
    values: dict[str, Any] = {}
    for statistic in request.statistics:
        if statistic.model_result is not None:
            of_layers = tuple(parts.get(statistic.name, {}).values())
            sums = ModelSums(of_layers, rows, request.ntk_samples, index, labels)
            values |= statistic.named(statistic.model_result(sums))
    extra = {name: values.pop(name) for name in list(values) if "." in name}
    return {**values, "extra": extra or None}


def module_costs(
    model: torch.nn.Module, first_block: str | None, inputs: dict[str, torch.Tensor], statistics: Sequence[Statistic]
) -> dict[str, ModuleCosts]:
    """Costs of every module that is called, by name.

    Args:
        model: frozen, in evaluation mode.
        first_block: where the backward pass reaches down to (see ``frozen_footprint``).
        inputs: a full batch.
        statistics: which costs.
    """
    measured = {one: one.module_values(model, first_block, inputs) for one in statistics if one.module_values}
    called = [name for name, _ in model.named_modules() if name and any(name in found for found in measured.values())]
    costs = {}
    for name in called:
        values = {one: found.get(name, one.module_absent) for one, found in measured.items()}
        own = {one.fields[0]: value for one, value in values.items() if one.fields}
        extra = {one.name: value for one, value in values.items() if not one.fields and value is not None}
        costs[name] = ModuleCosts(**own, extra=extra or None)
    return costs


def left_out_of(model: torch.nn.Module, covered: dict[str, str]) -> tuple[dict[str, str], float]:
    """(parameters without statistics and why, share of the parameters that have some).

    Each tied parameter is under the name that the model gives it.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    have = {id(parameters[name]) for name in covered if name in parameters}
    packed = {name for name in quantized_layers(model) if f"{name}.weight" in covered}
    left_out = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in have:
            path, _, part = name.rpartition(".")
            if path in packed and part != "bias":
                continue
            module = model.get_submodule(path)
            reason = why_not_measurable(path, module) if part == "weight" else f"not a weight matrix ({part})"
            left_out[name] = reason or "not requested, or no gradient reaches it"
    counts = [weight_count(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in left_out]
    return left_out, 1.0 - sum(counts) / parameter_count(model)
