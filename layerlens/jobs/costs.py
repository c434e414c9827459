"""What a choice is predicted to cost, by a trace of its very step, and what it costs on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerlens.cost.device import DeviceProfile, calibrate, load_profile, profile_path, save_profile
from layerlens.cost.measure import peak_bytes, time_ms, training_step
from layerlens.cost.trace import trace_step
from layerlens.exceptions import ManifestError
from layerlens.integrations.expert_products import plain_products
from layerlens.integrations.flops import FlopCounter
from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.models import Choice
from layerlens.registry import METHODS, TASKS
from layerlens.tuning import apply, unapply
from layerlens.utils.progress import Progress, silent

STEP_SECONDS = 2.0


@dataclass(frozen=True)
class Comparison:
    """One figure: predicted without running the model, and measured on it."""

    predicted: float
    measured: float

    @property
    def relative_error(self) -> float:
        """(predicted − measured) / measured."""
        return (self.predicted - self.measured) / self.measured if self.measured else 0.0


def device_profile(
    cache_dir: Path, *, recalibrate: bool = False, cpu_time: bool = False, progress: Progress = silent
) -> DeviceProfile:
    """The kept profile of this device and number of threads; measured, and kept, where there is none."""
    path = profile_path(cache_dir)
    found = None if recalibrate else load_profile(path)
    if found is None:
        found = calibrate(progress, cpu_time=cpu_time)
        save_profile(found, path)
    return found


def compare_costs(
    choice: Choice,
    pretrained: PretrainedModel,
    profile: DeviceProfile,
    *,
    batch_size: int,
    sequence_length: int,
    factors: dict[str, torch.Tensor] | None = None,
    seconds: float = STEP_SECONDS,
    cpu_time: bool = False,
    progress: Progress = silent,
) -> dict[str, Comparison]:
    """Inject the choice into the model, hold the predictions against measurements, and take the choice out again.

    Args:
        choice: what to inject.
        pretrained: its base model, freshly loaded.
        profile: of the device that the model is on.
        batch_size, sequence_length: the batch, full, of random tokens.
        factors: see ``layerlens.tuning.apply``.
        seconds: how long training steps are timed.
        cpu_time: see ``layerlens.cost.measure.time_ms``.
        progress: reports the steps.

    Returns:
        "trainable_params" (task head left out); "flops", of a forward pass; "step_memory_gb", the peak of a training
        step with AdamW, and "step_memory_above_weights_gb"; "step_ms".

    Raises:
        ManifestError: the choice does not fit the model, or its task has no synthetic batch.
    """
    model, chosen = pretrained.model, choice.chosen
    batch = synthetic_batch(model, choice.task, batch_size, sequence_length)
    spec = model_spec(pretrained, "", adapter_sites="all", methods={option.method for option in chosen})
    layers = {layer.name: layer for layer in spec.layers}
    # torch counts no FLOPs of the grouped products of experts, and cannot trace them.
    with plain_products(model), progress.stage("Predicting and measuring", total=4) as advance:
        model.train()  # with dropout, attention goes another way
        with torch.no_grad():
            base_flops = trace_step(model, batch).flops
        tuned = apply(model, choice, factors=factors).train()
        unknown = [row.layer for row in chosen if row.layer not in layers]
        if unknown:
            raise ManifestError(f"{unknown[0]}: costs are predicted for layers of transformer blocks only")
        tokens = batch_size * sequence_length
        steps = [METHODS[one.method].operations(layers[one.layer], one.rank) for one in chosen]
        added = sum(tokens * step.flops + step.call_flops for of_layer in steps for step in of_layer)
        parameters = choice.trainable_params(spec)
        trained = {name: tensor for name, tensor in tuned.named_parameters() if tensor.requires_grad}
        trace = trace_step(tuned, batch)
        advance(1)
        step, state = training_step(tuned, lambda: tuned(**batch).loss)
        elements = sum(tensor.numel() for tensor in trained.values())
        step_ms = profile.step_ms(trace, len(trained), elements)
        tensors = (*tuned.parameters(), *tuned.buffers(), *batch.values())
        resident = sum(tensor.numel() * tensor.element_size() for tensor in tensors) + state
        step()  # the optimiser's state is there from the second step on
        measured_peak = peak_bytes(step)
        advance(1)
        with FlopCounter(tuned) as counter, torch.no_grad():
            tuned(**batch)
        advance(1)
        measured_ms = time_ms(step, seconds=seconds, cpu_time=cpu_time)
        advance(1)
    unapply(tuned)
    marks = [METHODS[method].parameter_mark for method in METHODS]
    own = sum(tensor.numel() for name, tensor in trained.items() if any(mark in name for mark in marks))
    return {
        "trainable_params": Comparison(parameters, own),
        "flops": Comparison(base_flops + added, counter.get_total_flops()),
        "step_memory_gb": Comparison(1e-9 * (resident + trace.peak_bytes), 1e-9 * (resident + measured_peak)),
        "step_memory_above_weights_gb": Comparison(1e-9 * trace.peak_bytes, 1e-9 * measured_peak),
        "step_ms": Comparison(step_ms, measured_ms),
    }


def synthetic_batch(model: Any, task: str, batch_size: int, sequence_length: int) -> dict[str, torch.Tensor]:
    """A full batch of random tokens with labels; costs depend on shapes alone.

    Without a mask: models look into a mask whether it hides anything, which a trace without data cannot.

    Raises:
        ManifestError: the task has another kind of input.
    """
    kind = TASKS.get(task)
    if kind is None or kind.synthetic_labels is None:
        known = ", ".join(other.name for other in TASKS.values() if other.synthetic_labels is not None)
        raise ManifestError(
            f"costs are measured on synthetic tokens for {known}, not for {task}; `layerlens run` measures what it has "
            "predicted on samples of the data (optimization.check_predictions), and its report shows both"
        )
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, sequence_length)
    ids = torch.randint(5, int(model.config.get_text_config().vocab_size), shape, generator=generator)
    return {"input_ids": ids, "labels": kind.synthetic_labels(ids)}
