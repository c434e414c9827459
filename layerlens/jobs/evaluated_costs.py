"""``layerlens evaluate --costs``: a manifest's costs, predicted and measured, beside those of uniform LoRA.

Memory and time of a step are predicted as they are for the solver (``CostTable.total`` of a recorded step), for the
manifest's choice and for uniform LoRA of as many parameters. Both are then put into the model and measured in turn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerlens.config import OptimizationConfig
from layerlens.cost import cost_table
from layerlens.cost.device import DeviceProfile
from layerlens.cost.measure import peak_bytes, step_parts_ms, training_step
from layerlens.exceptions import ConfigurationError
from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.integrations.quantized import quantized_layers, weight_bytes
from layerlens.integrations.transformers import without_cache
from layerlens.jobs.costs import Comparison, compare_costs, synthetic_batch
from layerlens.jobs.job import Warn, unheard
from layerlens.jobs.recorded import config_of
from layerlens.jobs.recorded_step import UNRECORDABLE, StepOf, recorded, told_of_uncounted
from layerlens.jobs.worth import PARAMS, uniform_entries
from layerlens.methods import enumerate_options
from layerlens.models import LORA, Choice, CostTable, Footprint, LoraSettings, Manifest, ModelSpec
from layerlens.models.step import StepRecord
from layerlens.registry import TASKS
from layerlens.tuning import apply, read_factors, unapply
from layerlens.tuning.base_model import fitting_choice, load_base
from layerlens.utils.progress import Progress, silent

STEP_SECONDS = 2.0
PARTS = ("forward_ms", "backward_ms", "optimizer_ms")
"""Parts of a step's time, as they are measured."""


@dataclass(frozen=True)
class EvaluatedCosts:
    """Costs of a choice and of uniform LoRA with as many parameters, on one machine.

    Args:
        choice: "trainable_params", "flops", "step_memory_gb", "step_ms", and of the choice's trace
            "step_memory_above_weights_gb".
        parts: measured milliseconds of the choice's forward pass, backward pass and optimiser, by ``PARTS``.
        uniform_lora: "trainable_params", "step_memory_gb" and "step_ms"; None where no step is recorded or there is no
            LoRA to compare with.
        uniform_parts: its measured parts.
    """

    choice: dict[str, Comparison]
    parts: dict[str, float]
    uniform_lora: dict[str, Comparison] | None = None
    uniform_parts: dict[str, float] | None = None


def evaluate_costs(
    manifest: Manifest,
    *,
    model: str | None,
    base_dir: Path,
    measured_factors: Path,
    profile: DeviceProfile,
    batch_size: int,
    sequence_length: int,
    trust_remote_code: bool = False,
    progress: Progress = silent,
    warn: Warn = unheard,
) -> EvaluatedCosts:
    """Load the manifest's base model, predict, and measure.

    Where no step of the model can be recorded, memory and time are predicted from a trace of the choice's own step, and
    there is no uniform LoRA beside it; a warning says so.
    """
    with progress.stage("Loading model"):
        pretrained = load_base(manifest, model, base_dir, trust_remote_code=trust_remote_code)
    choice, _ = fitting_choice(pretrained.model, manifest)
    factors = read_factors(measured_factors, choice)
    config = _config(manifest, batch_size, sequence_length)
    table = plain = None
    try:
        with progress.stage("Recording a training step"):
            step, table, plain = _tables(choice, pretrained, profile, config)
    except UNRECORDABLE as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warn(
            f"a training step of this model could not be recorded ({reason}); memory and time are predicted from a "
            "trace of the choice's own step, and uniform LoRA is not compared"
        )
    else:
        if step.uncounted:
            warn(told_of_uncounted(step))
    found = compare_costs(
        choice,
        pretrained,
        profile,
        batch_size=batch_size,
        sequence_length=sequence_length,
        factors=factors,
        seconds=STEP_SECONDS if table is None else 0.0,
        progress=progress,
    )
    batch = synthetic_batch(pretrained.model, choice.task, batch_size, sequence_length)
    with progress.stage("Timing a training step", total=None):
        own = _measured(pretrained.model, choice, batch, config, factors)
    parts = {name: own[name] for name in PARTS}
    if table is None or plain is None:
        return EvaluatedCosts(found, parts)
    predicted = table.total(_entries(table, choice))
    found |= {
        "step_memory_gb": Comparison(predicted["vram_gb"], own["vram_gb"]),
        "step_ms": Comparison(predicted["step_ms"], own["step_ms"]),
    }
    other = uniform_entries(table, float(table.cost__ro[PARAMS, _entries(table, choice)].sum()))
    if not len(other):
        return EvaluatedCosts(found, parts)
    picked = {table.options[entry].layer: (LORA, table.options[entry].rank) for entry in other}
    uniform = Choice.of(picked, lora=LoraSettings(1.0), head_modules=choice.head_modules, task=choice.task)
    with progress.stage("Timing uniform LoRA", total=None):
        measured = _measured(pretrained.model, uniform, batch, config)
    total = plain.total(other)
    beside = {
        "trainable_params": Comparison(total["trainable_params"], measured["trainable_params"]),
        "step_memory_gb": Comparison(total["vram_gb"], measured["vram_gb"]),
        "step_ms": Comparison(total["step_ms"], measured["step_ms"]),
    }
    return EvaluatedCosts(found, parts, beside, {name: measured[name] for name in PARTS})


def _config(manifest: Manifest, batch_size: int, sequence_length: int) -> OptimizationConfig:
    """The run's methods and optimiser, for the batch that is measured."""
    try:
        config = config_of(manifest).optimization
    except ConfigurationError:  # a manifest that does not say how it was made
        config = OptimizationConfig(max_trainable_params=1)
    profile = config.latency_profile.model_copy(update={"batch_size": batch_size, "sequence_length": sequence_length})
    return config.model_copy(update={"latency_profile": profile})


def _tables(
    choice: Choice, pretrained: PretrainedModel, profile: DeviceProfile, config: OptimizationConfig
) -> tuple[StepRecord, CostTable, CostTable]:
    """The recorded step, and costs of everything that the choice and uniform LoRA are made of, for full batches of the
    configuration: with the choice's blocks checkpointed, and with none.

    Raises:
        one of ``UNRECORDABLE``: no step can be recorded.
    """
    model, latency = pretrained.model, config.latency_profile
    if quantized_layers(model):
        raise NotImplementedError("quantized weights are unpacked in ways that autograd does not show")
    batch = synthetic_batch(model, choice.task, 2, latency.sequence_length)
    spec = model_spec(pretrained, "", adapter_sites="all", methods={LORA, *(one.method for one in choice.chosen)})
    spec = _only(spec, {option.layer for option in choice.options})
    sizes = defaultdict[str, set[int]](set)
    sizes[LORA] |= {*config.lora_ranks}
    for option in choice.chosen:
        sizes[option.method].add(option.rank)
    options = enumerate_options(spec, {method: sorted(found) for method, found in sizes.items()})
    missing = [option.layer for option in choice.chosen if option not in options]
    if missing:
        raise LookupError(f"{missing[0]} has options that cannot be enumerated")
    labels = batch.pop("labels")
    step = recorded(StepOf(model, TASKS[choice.task], batch, labels, choice.head_modules), spec)
    footprint = Footprint(0.0, 0.0, replace(step, rates=asdict(profile)))
    plain = cost_table(spec, footprint, options, config)
    if not choice.checkpointed:
        return step, plain, plain
    return step, cost_table(spec, footprint, options, config, checkpointed=choice.checkpointed), plain


def _only(spec: ModelSpec, layers: set[str]) -> ModelSpec:
    """The layers that the manifest's run had on offer."""
    return replace(spec, layers=[layer for layer in spec.layers if layer.name in layers])


def _entries(table: CostTable, choice: Choice) -> np.ndarray:
    """The table's entries of what the choice adapts."""
    chosen = set(choice.chosen)
    return np.array([entry for entry, option in enumerate(table.options) if option in chosen], dtype=np.int64)


def _measured(
    model: torch.nn.Module,
    choice: Choice,
    batch: dict[str, torch.Tensor],
    config: OptimizationConfig,
    factors: dict[str, torch.Tensor] | None = None,
) -> dict[str, float]:
    """A real training step with the choice in the model, which is taken out again."""
    tuned: Any = apply(model, choice, factors=factors).train()
    try:
        with without_cache(tuned):
            loss: Callable[[], torch.Tensor] = partial(_loss, tuned, batch)
            step, state = training_step(tuned, loss, config.optimizer)
            step()  # the optimiser's state is there from the second step on
            memory = 1e-9 * (weight_bytes(tuned) + state + peak_bytes(step))
            times = step_parts_ms(tuned, loss, config.optimizer, seconds=STEP_SECONDS)
        heads = {id(weight) for name in choice.head_modules for weight in tuned.get_submodule(name).parameters()}
        trained = sum(w.numel() for w in tuned.parameters() if w.requires_grad and id(w) not in heads)
        return {"vram_gb": memory, "trainable_params": trained, **times}
    finally:
        tuned.zero_grad()
        unapply(tuned)


def _loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    loss: torch.Tensor = model(**batch).loss
    return loss
