"""The training step of a loaded model, recorded on tensors without data; costs of every choice follow from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from layerlens.config import LatencyProfile, OptimizationConfig, RunConfig
from layerlens.config.optimization import CHEAPEST, STEP
from layerlens.cost.device import load_profile, profile_path
from layerlens.cost.measure import here
from layerlens.integrations.audio_input import SPECTRA, WAVES
from layerlens.integrations.expert_products import plain_products
from layerlens.integrations.placement import offloaded, sharded
from layerlens.integrations.quantized import quantized_layers
from layerlens.integrations.torch_modules import learns_in_forward
from layerlens.integrations.transformers import without_cache
from layerlens.jobs.costs import device_profile
from layerlens.jobs.job import Job
from layerlens.jobs.load import Loaded
from layerlens.models import ModelStatistics
from layerlens.models.step import StepRecord
from layerlens.profiling.footprint import TOKENS, dense_inputs, without_data
from layerlens.profiling.step_record import record_step
from layerlens.tasks import Task
from layerlens.tasks.batches import Batch
from layerlens.tasks.losses import BatchLoss, output_tensors
from layerlens.utils.places import default_cache_dir

UNRECORDABLE = (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, LookupError, AssertionError)
"""What a model may raise that looks at numbers where there are none."""
SAMPLES = (2, 4)
MASKS = ("attention_mask", "decoder_attention_mask")
FULL = {"input_ids", WAVES, SPECTRA}
"""Inputs that are full without a mask: tokens and sound."""


@dataclass(frozen=True)
class StepOf:
    """What a step is recorded of.

    Args:
        model: the model.
        task: its loss, and how the model takes targets.
        inputs: a full batch.
        labels: targets of a batch, where they are a tensor with the samples along its first axis; None: no loss.
        heads: modules that train in every choice.
        real: make batches of the very inputs, over and over, instead of zeros.
    """

    model: torch.nn.Module
    task: Task
    inputs: Mapping[str, torch.Tensor]
    labels: torch.Tensor | None
    heads: tuple[str, ...] = ()
    real: bool = False

    @property
    def length(self) -> int:
        """Tokens of a sample; 0 where they are no tokens."""
        of_tokens = "input_ids" in self.inputs and all(name in TOKENS for name in self.inputs)
        return self.inputs["input_ids"].shape[1] if of_tokens else 0

    def losses(self) -> Iterator[Callable[[int], torch.Tensor]]:
        """Ways to make the loss of so many samples, the likest to training first."""
        if self.labels is not None and self.task.model_targets:
            yield self._models_own
        if self.labels is not None:
            yield self._tasks
        yield self._outputs

    def _made(self, samples: int) -> dict[str, torch.Tensor]:
        made = {}
        for name, like in self.inputs.items():
            if name not in MASKS or not FULL & set(self.inputs):  # a full batch needs none
                if self.real:
                    made[name] = like[torch.arange(samples) % len(like)]
                else:
                    made[name] = torch.zeros((samples, *like.shape[1:]), dtype=like.dtype, device=like.device)
        return made

    def _targets(self, inputs: Mapping[str, torch.Tensor], samples: int) -> torch.Tensor:
        if "input_ids" in inputs and self.task.synthetic_labels is not None:
            return self.task.synthetic_labels(inputs["input_ids"])
        assert self.labels is not None
        like = self.labels
        shape = [samples, *like.shape[1:]]
        return torch.zeros(shape, dtype=like.dtype, device=next(iter(inputs.values())).device)

    def _models_own(self, samples: int) -> torch.Tensor:
        inputs = self._made(samples)
        labels, names = self._targets(inputs, samples), self.task.model_targets
        columns = {name: labels[:, place] for place, name in enumerate(names)} if len(names) > 1 else {names[0]: labels}
        loss: torch.Tensor = self.model(**inputs, **columns).loss
        return loss

    def _tasks(self, samples: int) -> torch.Tensor:
        inputs = self._made(samples)
        batch = Batch(inputs, self._targets(inputs, samples), torch.arange(samples))
        loss: Any = self.task.loss
        if isinstance(loss, BatchLoss):
            return loss.of_model(self.model, batch).sum()
        return torch.as_tensor(loss(self.model(**inputs), batch)).mean()

    def _outputs(self, samples: int) -> torch.Tensor:
        return torch.stack([tensor.sum() for tensor in output_tensors(self.model(**self._made(samples)))]).sum()


def recorded(of: StepOf, spec: Any) -> StepRecord:
    """The step, recorded with the first loss that the model can make.

    Raises:
        one of ``UNRECORDABLE``: it cannot be recorded at all.
    """
    with as_trained(of.model), without_cache(of.model), plain_products(of.model):
        for step in of.losses():
            try:
                return record_step(of.model, spec, step, heads=of.heads, batch_sizes=SAMPLES, sequence_length=of.length)
            except UNRECORDABLE as error:
                last = error
    raise last


@contextmanager
def as_trained(model: torch.nn.Module) -> Iterator[None]:
    """While open, the frozen model is in training mode as ``tuning.apply`` leaves it: dropout acts, batch normalisation
    does not learn, and nothing is checkpointed.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    checkpoints: list[Any] = [x for x in model.modules() if getattr(x, "gradient_checkpointing", False) is True]
    try:
        model.train()
        for module in model.modules():
            if learns_in_forward(module):
                module.training = False
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for module in checkpoints:
            module.gradient_checkpointing = False
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, required in flags:
            parameter.requires_grad_(required)
        for module in checkpoints:
            module.gradient_checkpointing = True


def step_of(loaded: Loaded, heads: tuple[str, ...], length: int, *, real: bool = False) -> StepOf:
    """What a step of the loaded model is recorded or measured of, with sequences of ``length`` tokens."""
    batch = loaded.typical
    example = batch.inputs if loaded.example is None else dict(loaded.example)
    labels = batch.labels if isinstance(batch.labels, torch.Tensor) else None
    model = loaded.pretrained.model
    return StepOf(model, loaded.task, dense_inputs(example, length, model=model), labels, heads, real)


def with_step(job: Job, loaded: Loaded, statistics: ModelStatistics, heads: tuple[str, ...]) -> ModelStatistics:
    """The statistics with the recorded step of the model, and the rates of the device where they are known.

    A step of the cache is taken where its sequences are as long as those that costs are for.
    """
    config = job.config.optimization
    length = config.latency_profile.sequence_length
    step = statistics.step
    if step is None or step.sequence_length not in (0, length):
        step = _record(job, loaded, heads, length)
    if step is not None:
        step = replace(step, rates=device_rates(job, config))
        if step.uncounted:
            job.warnings.add(told_of_uncounted(step))
    return replace(statistics, step=step)


def told_of_uncounted(step: StepRecord) -> str:
    """Which operations the predicted memory lacks something of, and why."""
    reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(step.uncounted.items()))
    return (
        "predicted memory does not count what these operations take for themselves while they run, so a real step may "
        f"need more: {reasons}"
    )


def _record(job: Job, loaded: Loaded, heads: tuple[str, ...], length: int) -> StepRecord | None:
    model, reason = loaded.pretrained.model, ""
    on_disk = loaded.pretrained.streamed is not None
    if sharded(model) or offloaded(model):
        reason = "its weights are spread"
    elif quantized_layers(model):
        reason = "quantized weights are unpacked in ways that autograd does not show"
    if not reason:
        try:
            of = step_of(loaded, heads, length)
            shapes = without_data(model) if on_disk else nullcontext()
            with job.progress.stage("Recording a training step", total=None), shapes:
                return recorded(of, loaded.spec)
        except UNRECORDABLE as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    job.warnings.add(
        f"a training step of this model could not be recorded ({reason}), so memory is predicted as an upper bound "
        "(every choice is charged the activations of the whole model) and the time of a step is not predicted"
    )
    return None


def device_rates(job: Job, config: OptimizationConfig) -> dict[str, Any] | None:
    """Measured rates of this device, where it is the one that costs are for; measured now where a budget needs them.

    None where the configuration has figures of its own, where the device is elsewhere, and where nothing is measured.
    """
    profile = config.latency_profile
    if has_figures(profile) or not here(profile.device_type):
        return None
    directory = default_cache_dir() if job.cache is None else job.cache.directory
    if job.cache is not None and time_is_minimised_or_bounded(job.config):
        found = device_profile(directory, progress=job.progress)
    else:
        known = load_profile(profile_path(directory))
        if known is None:
            return None
        found = known
    return asdict(found)


def time_is_minimised_or_bounded(config: RunConfig) -> bool:
    """Whether the choice depends on how long a training step takes."""
    optimization = config.optimization
    if optimization.max_step_ms is not None or config.training.max_train_hours is not None:
        return True
    return optimization.objective == CHEAPEST and STEP in optimization.minimised()


def has_figures(profile: LatencyProfile) -> bool:
    """Whether the configuration says how fast the device is."""
    return profile.peak_gflops is not None or profile.memory_bandwidth_gb_s is not None
