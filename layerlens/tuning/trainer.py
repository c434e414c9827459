"""transformers' Trainer as ``fine_tune`` uses it: its loop, optimiser, precision and processes; our data order,
evaluation and checkpoints.

Evaluations and checkpoints happen after the same optimiser steps in every run, first the evaluation: a checkpoint then
has the evaluations of its own step, and a run that continues from it misses none.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from layerlens.exceptions import ConfigurationError, LayerLensError, OutputError, TrainingError
from layerlens.tasks import IGNORED, TASKS, task_metrics
from layerlens.tasks.metrics import TARGETS
from layerlens.tuning.checkpoints import (
    HOOKS_FILE,
    WEIGHTS_FILE,
    checkpoint_path,
    finish_checkpoint,
    load_weights,
    read_progress,
    save_weights,
)
from layerlens.tuning.fine_tune import FineTune, TrainingResult, training_arguments
from layerlens.tuning.inject import stop_at_the_lowest
from layerlens.tuning.reporting import callbacks_of, reporting
from layerlens.tuning.samples import INDEX, NumberedSamples, SeededOrder, evaluate
from layerlens.tuning.short_training import FP16_LOSS_SCALE
from layerlens.tuning.steps import steps_per_epoch, total_steps
from layerlens.tuning.stored_prefix import DIRECTORY, StoredPrefix, maybe
from layerlens.utils.atomic import cannot_write
from layerlens.utils.memory import PeakMemory
from layerlens.utils.progress import Advance

SHOWN_SAMPLES = 8
PEFT_FLAG = "_hf_peft_config_loaded"
"""By which transformers knows a model that has adapters inside."""


@dataclass
class Recorder:
    """What has happened so far; it is saved in every checkpoint."""

    losses: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    best_step: int = 0
    best_value: float | None = None
    stale: int = 0
    finished: bool = False
    stopped_early: bool = False
    tokens: int = 0
    train_seconds: float = 0.0
    wall_seconds: float = 0.0


def run(job: FineTune, find_checkpoint: Callable[[Path], Path | None]) -> TrainingResult:
    """Train, or go on, and leave the model with the best weights; see ``training.fine_tune``."""
    memory, started = PeakMemory(), time.perf_counter()
    with _Quiet(), _known_to_be_adapted(job.model):
        trainer = _Trainer(job, training_arguments(job))
    _wait(trainer)  # the first process has looked after the directory
    checkpoint = find_checkpoint(job.checkpoints)
    if checkpoint is not None:
        trainer.recorder = Recorder(**read_progress(checkpoint))
    resumed_from = len(trainer.recorder.losses) if checkpoint is not None else None
    trainer.wall_before = trainer.recorder.wall_seconds
    trainer.started = started
    steps = total_steps(len(job.data.train), job.config, trainer.args.world_size)
    trainer.prefix = prefix_of(job, steps, trainer.args.world_size)
    if not trainer.recorder.finished:
        with _Quiet(), _scaled(trainer), job.progress.stage("Training", total=steps) as advance, maybe(trainer.prefix):
            advance(resumed_from or 0)
            trainer.advance = advance
            if trainer.prefix is not None and resumed_from:
                trainer.take_up_prefix(resumed_from)
            with reporting(job.reports):
                trainer.callback_handler.callbacks += callbacks_of(job.reports, job.tell)
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    elif checkpoint is not None:
        load_weights(job.model, checkpoint / WEIGHTS_FILE)
    recorder = trainer.recorder
    if job.config.keep_best and recorder.best_step not in (0, len(recorder.losses)):
        load_weights(job.model, trainer.best_file(recorder.best_step))
    last = recorder.best_step if job.config.keep_best and recorder.best_step else len(recorder.losses)
    chosen = next((each for each in reversed(recorder.evaluations) if each["step"] == last), {})
    job.model.eval()
    return TrainingResult(
        metrics={name: value for name, value in chosen.items() if name != "step"},
        evaluations=tuple(recorder.evaluations),
        losses=tuple(recorder.losses),
        best_step=last,
        steps=len(recorder.losses),
        trained_parameters=sum(job.model.get_parameter(name).numel() for name in job.names),
        tokens=recorder.tokens,
        train_seconds=recorder.train_seconds,
        wall_seconds=trainer.wall_before + time.perf_counter() - started,
        tokens_per_second=recorder.tokens / max(recorder.train_seconds, 1e-9),
        peak_memory_gb=memory.gb(),
        peak_memory_of=memory.source,
        resumed_from=resumed_from,
        processes=trainer.args.world_size,
        stopped_early=recorder.stopped_early,
        stored_prefix=_freed(trainer.prefix),
        job=job.identity,
    )


@contextmanager
def _known_to_be_adapted(model: Any) -> Iterator[None]:
    """While open, Trainer takes a quantized model with adapters or prefixes of ours as one with PEFT's.

    Raises:
        TrainingError: a model of this quantization cannot be trained.
    """
    quantized = getattr(model, "is_quantized", False) and not hasattr(model, "peft_config")
    before = getattr(model, PEFT_FLAG, False)
    if quantized:
        setattr(model, PEFT_FLAG, True)
    try:
        yield
    except ValueError as error:
        if not getattr(model, "is_quantized", False):
            raise
        raise TrainingError(f"the quantized base model cannot be trained: {' '.join(str(error).split())}") from error
    finally:
        if quantized:
            setattr(model, PEFT_FLAG, before)


class _Trainer(Trainer):
    def __init__(self, job: FineTune, arguments: TrainingArguments) -> None:
        super().__init__(
            model=job.model,
            args=arguments,
            data_collator=job.data.collate,
            train_dataset=NumberedSamples(job.data.train),
            callbacks=[_Steps(self)],
        )
        self.remove_callback(PrinterCallback)
        self.job, self.recorder = job, Recorder()
        self.order = SeededOrder(len(job.data.train), job.seed)
        self.metric = job.config.metric
        self.advance: Advance = lambda steps=1, /, note="": None
        self.started, self.wall_before, self.step_started = 0.0, 0.0, 0.0
        self.step_loss, self.step_samples = 0.0, list[int]()
        self.loss_scale = 1.0
        self.prefix: StoredPrefix | None = None
        per_epoch = steps_per_epoch(len(job.data.train), job.config, arguments.world_size)
        self.eval_every = job.config.eval_every or per_epoch
        self.save_every = job.config.save_every or per_epoch

    def best_file(self, step: int) -> Path:
        """Where the weights of the best evaluation are kept."""
        return self.job.checkpoints / f"best-{step}.safetensors"

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        return self.order

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device) -> Any:
        """What the mean of one optimiser step is over: items of all its batches, on all processes."""
        count = torch.tensor(float(sum(map(self.items, batch_samples))), device=device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(count)
        return count

    def items(self, batch: dict[str, torch.Tensor]) -> int:
        """What the model's loss is the mean over: labelled tokens, or samples."""
        labels = batch.get("labels") if TASKS[self.job.task].token_labels or TARGETS not in batch else None
        if labels is None or labels.dim() < 2 or labels.is_floating_point():
            return len(batch[INDEX])
        return int((labels[:, TASKS[self.job.task].shift :] != IGNORED).sum())

    def training_step(self, model: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: Any = None) -> Any:
        """One forward and backward pass; the loss is weighted so that a step is the mean over all its items.

        Trainer would leave that to the model's loss function, and most of them take the argument and ignore it.
        """
        share = self.args.world_size * self.items(inputs) / float(num_items_in_batch)
        samples = inputs.pop(INDEX).tolist()
        self.step_samples += samples
        mask = inputs.get("attention_mask")
        counts = torch.tensor(float(mask.sum() if mask is not None else len(samples)), device=self.args.device)
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            own = self.job.loss
            value = self.job.data.output(model, inputs).loss if own is None else own(model, inputs)
            value = share * value.mean()  # of the devices of one process
        self.accelerator.backward(value * self.loss_scale)
        value = value.detach()
        mean = value.clone()
        if self.args.world_size > 1:
            torch.distributed.all_reduce(counts)
            torch.distributed.all_reduce(mean)
            mean /= self.args.world_size
        self.recorder.tokens += int(counts)
        self.step_loss += float(mean)
        if not math.isfinite(float(mean)):
            others = "" if not math.isfinite(float(value)) else " of another process"
            self.stop(f"the loss{others} is {float(mean):g}", samples)
        return value

    def stop(self, reason: str, samples: list[int]) -> None:
        """End with what went wrong, on which samples, and where the last good state is."""
        from layerlens.tuning.checkpoints import last_checkpoint

        last = last_checkpoint(self.job.checkpoints)
        shown = ", ".join(map(str, samples[:SHOWN_SAMPLES])) + (", ..." if len(samples) > SHOWN_SAMPLES else "")
        state = f"the last good checkpoint is {last}" if last else "no checkpoint had been written yet"
        raise TrainingError(
            f"{reason} at step {self.state.global_step + 1} (training samples {shown}); no step was taken on it and "
            f"{state}. Look at these samples, or lower training.learning_rate"
        )

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Judge the model as it is, remember the best, and decide whether to stop early."""
        job, recorder, step = self.job, self.recorder, self.state.global_step
        metrics = evaluate(job.model, job.data, job.task, batch_size=job.config.eval_batch_size)
        judged = task_metrics(job.task)
        self.metric = self.metric or next(name for name in judged.primary if name in metrics)
        if self.metric not in metrics:
            raise ConfigurationError(
                f"training.metric: {self.metric!r} is not a metric of {job.task}; known: {', '.join(metrics)}"
            )
        recorder.evaluations.append({"step": step, **metrics})
        reported = {f"eval_{name}": value for name, value in metrics.items()}
        self._report(reported)
        if not all(hook.settled(step) for hook in job.hooks):
            return reported
        recorder.stale += 1
        if judged.better(self.metric, metrics[self.metric], recorder.best_value, job.config.early_stopping_threshold):
            recorder.best_step, recorder.best_value, recorder.stale = step, metrics[self.metric], 0
            if job.config.keep_best and self.is_world_process_zero():
                save_weights(job.model, job.names, self.best_file(step))
        patience = job.config.early_stopping_patience
        if patience is not None and recorder.stale >= patience:
            recorder.finished = recorder.stopped_early = True
            self.control.should_training_stop = self.control.should_save = True
        return reported

    def _report(self, metrics: dict[str, float]) -> None:
        if self.job.reports.names:
            self.log(dict(metrics))
            self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.job.checkpoints)

    def take_up_prefix(self, step: int) -> None:
        """Have the activations of the first epoch's batches again that were stored by this step; those that a run lost
        are computed in the same batches, so that training continues with the same bits.
        """
        assert self.prefix is not None
        self.prefix.file.load()
        size, order = self.job.config.batch_size, list(self.order)
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        batches = batches[: step * self.job.config.gradient_accumulation]

        if self.prefix.file.batches < len(batches):
            self.job.model.train()
            self.prefix.fill(partial(self._forward, batch) for batch in batches)

    def _forward(self, numbers: list[int]) -> Any:
        batch = self.job.data.collate([self.job.data.train[number] for number in numbers])
        inputs, own = self._prepare_inputs(batch), self.job.loss
        with self.compute_loss_context_manager():
            return self.job.data.output(self.job.model, inputs) if own is None else own(self.job.model, inputs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        path = Path(output_dir)
        save_weights(self.job.model, self.job.names, path / WEIGHTS_FILE)
        torch.save([hook.state_dict() for hook in self.job.hooks], path / HOOKS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint)
        load_weights(self.job.model, path / WEIGHTS_FILE)
        for hook, state in zip(self.job.hooks, torch.load(path / HOOKS_FILE, weights_only=False), strict=True):
            hook.load_state_dict(state)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        path = checkpoint_path(self.job.checkpoints, self.state.global_step)
        try:
            if self.prefix is not None:
                self.prefix.file.save_index()
            super()._save_checkpoint(model, trial)
            _wait(self)  # every process has written its random state
            if self.is_world_process_zero():
                self.recorder.wall_seconds = self.wall_before + time.perf_counter() - self.started
                finish_checkpoint(path, asdict(self.recorder), {self.best_file(self.recorder.best_step).name})
            _wait(self)
        except (LayerLensError, OSError, RuntimeError, SafetensorError) as error:
            import shutil

            shutil.rmtree(path, ignore_errors=True)  # makes room again, too
            raise _not_saved(path, error) from error


class _Steps(TrainerCallback):
    """Calls the hooks, checks gradients, and decides after which steps to evaluate and to save."""

    def __init__(self, trainer: _Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.trainer.optimizer is not None
        stop_at_the_lowest(self.trainer.job.model)
        for hook in self.trainer.job.hooks:
            hook.before_training(self.trainer.job.model, self.trainer.optimizer, state.max_steps)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        job = self.trainer.job
        self.trainer.order.set_epoch(
            state.global_step // steps_per_epoch(len(job.data.train), job.config, args.world_size)
        )

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.step_loss, self.trainer.step_samples = 0.0, []
        self.trainer.step_started = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.accelerator.scaler is None:  # float16's scaler skips such steps and lowers the scale
            for name in trainer.job.names:
                gradient = trainer.job.model.get_parameter(name).grad
                if gradient is not None and not bool(torch.isfinite(gradient).all()):
                    trainer.stop(f"the gradient of {name} is not finite", trainer.step_samples)
        for hook in trainer.job.hooks:
            hook.before_step(trainer.job.model, state.global_step)

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for hook in self.trainer.job.hooks:
            hook.after_step(self.trainer.job.model, state.global_step + 1)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer, recorder, step = self.trainer, self.trainer.recorder, state.global_step
        recorder.train_seconds += time.perf_counter() - trainer.step_started
        recorder.losses.append(trainer.step_loss)
        recorder.finished = step >= state.max_steps
        control.should_evaluate = bool(len(trainer.job.data.evaluation)) and (
            step % trainer.eval_every == 0 or recorder.finished
        )
        control.should_save = step % trainer.save_every == 0 or recorder.finished
        trainer.advance(1, note=f"loss {trainer.step_loss:.4g}")

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_evaluate = control.should_save = False  # they have been done after the step


def prefix_of(job: FineTune, steps: int, processes: int) -> StoredPrefix | None:
    """What stores activations below the lowest adapted block, where the configuration asks for it.

    Raises:
        ConfigurationError: it is required, and cannot be done.
    """
    wanted = job.config.store_prefix
    if wanted is False:
        return None
    reason = ""
    if processes > 1:
        reason = "each process would see samples that others stored; start one process"
    elif steps <= steps_per_epoch(len(job.data.train), job.config):
        reason = "the training has one epoch, so no sample comes twice"
    if reason and wanted is True:
        raise ConfigurationError(f"training.store_prefix: {reason}, or set it to auto")
    if reason:
        job.tell(f"training.store_prefix: nothing is stored: {reason}")
        return None
    return StoredPrefix(
        job.model,
        job.checkpoints / DIRECTORY,
        samples=len(job.data.train),
        switch_off_dropout=wanted is True,
        dtype=torch.bfloat16 if job.config.prefix_precision == "bfloat16" else None,
        required=wanted is True,
        tell=job.tell,
    )


def _freed(prefix: StoredPrefix | None) -> dict[str, int] | None:
    """The facts of a prefix whose file is no longer needed."""
    if prefix is None:
        return None
    facts = prefix.facts
    prefix.file.remove()
    return facts


def _not_saved(path: Path, error: BaseException) -> LayerLensError:
    """The error of a checkpoint that could not be written, whichever library met it."""
    if isinstance(error, LayerLensError):
        return error
    if isinstance(error, OSError):
        return cannot_write(path, error)
    return OutputError(
        f"cannot write {path}: {' '.join(str(error).split())}; the last complete checkpoint stays, so free some space "
        "and run again"
    )


@contextmanager
def _scaled(trainer: _Trainer) -> Iterator[None]:
    """Where frozen weights are float16, gradients on their way to what trains are too, and lost below 6e-8: the loss is
    multiplied by a power of two, which each gradient is divided by again when it arrives.
    """
    model, scaler = trainer.job.model, trainer.accelerator.scaler
    half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
    trainer.loss_scale = FP16_LOSS_SCALE if half and scaler is None else 1.0
    scale = trainer.loss_scale
    trained = [model.get_parameter(name) for name in trainer.job.names] if scale != 1.0 else []
    handles = [parameter.register_hook(lambda gradient: gradient / scale) for parameter in trained]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _wait(trainer: Trainer) -> None:
    """All processes are here."""
    if trainer.args.world_size > 1:
        torch.distributed.barrier()


class _Quiet(warnings.catch_warnings):
    """Neither transformers' log lines nor torch's and accelerate's advice to their own callers."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        self.verbosity = logging.get_verbosity()
        logging.set_verbosity_error()

    def __exit__(self, *error: Any) -> None:
        logging.set_verbosity(self.verbosity)
        super().__exit__(*error)
