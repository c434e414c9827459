"""Proxy training: what options really gain in a few steps, measured on held-out samples, one after the other.

Every option goes through the same injection that a manifest does, starts from the same weights and sees the same
batches in the same order; only its own parameters are trained. Finished options are kept in the sensitivity cache, so
an interrupted study goes on where it stopped.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from layerlens.config import RunConfig
from layerlens.exceptions import ProfilingError
from layerlens.methods import enumerate_options
from layerlens.models import Choice, LoraSettings, Manifest, ModelSpec, Option, ProxyGain, ProxyStudy
from layerlens.profiling.proxies import SavedProxies, plan_proxies, study_from_json, study_to_json
from layerlens.tasks import Batch, Loss
from layerlens.tuning import apply
from layerlens.tuning.short_training import train_steps, twin_of
from layerlens.utils.progress import Progress

MIN_GAINS = 4


class ProxyTrainer:
    """Short trainings of one frozen model that can be compared with each other.

    Args:
        model: the frozen model, its head fitted; it is not changed.
        spec: its layers.
        train: batches to train on.
        held_out: batches to judge on, of other samples.
        loss: of each sample.
        config: learning rate, alpha/r and seed.
        steps: of every training; those of the proxies when not given.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        spec: ModelSpec,
        train: Sequence[Batch],
        held_out: Sequence[Batch],
        loss: Loss,
        config: RunConfig,
        steps: int | None = None,
    ) -> None:
        self.model, self.spec, self.loss, self.config = model, spec, loss, config
        self.held_out = list(held_out)  # every option is judged on them, so they are made once
        order = random.Random(config.runtime.seed)
        steps = steps or config.profiling.proxies.steps
        numbers: list[int] = []
        while len(numbers) < steps:  # whole passes, each in an order of its own
            numbers += order.sample(range(len(train)), len(train))
        made = {number: train[number] for number in sorted(set(numbers[:steps]))}
        self.batches = [made[number] for number in numbers[:steps]]
        self.base_losses = self._held_out_losses(model)

    def train(self, choice: Choice) -> np.ndarray:
        """Drop of every held-out sample's loss, float64 [n], by a few steps of what the choice injects (no head).

        Raises:
            ProfilingError: a loss is not finite after training.
        """
        drops = self.drops(choice, self.config.profiling.proxies.learning_rate)
        if not np.all(np.isfinite(drops)):
            what = ", ".join(f"{row.layer} {row.method} {row.rank}" for row in choice.chosen[:1])
            raise ProfilingError(
                f"{what}: the loss is not finite after {len(self.batches)} proxy steps; lower "
                f"profiling.proxies.learning_rate (it is {self.config.profiling.proxies.learning_rate:g})"
            )
        return drops

    def drops(self, choice: Choice, learning_rate: float, *, decay: bool = False) -> np.ndarray:
        """The same at any learning rate, constant or with warm-up and decay; not finite where the training diverged."""
        if not choice.chosen:
            return np.zeros_like(self.base_losses)
        # A as PEFT draws it, whatever the choice begins from: allocations are compared, not beginnings.
        lora = replace(choice.lora, initialization="default")
        model = apply(twin_of(self.model), replace(choice, head_modules=(), task="", lora=lora))
        losses = [partial(_losses_on, batch, self.loss) for batch in self.batches]
        train_steps(model, losses, learning_rate=learning_rate, decay=decay)
        return self.base_losses - self._held_out_losses(model)

    def gain(self, option: Option) -> ProxyGain:
        """What one option alone gains."""
        scale = self.config.optimization
        alone = Choice((option,), self.config.runtime.seed, LoraSettings(scale.alpha_over_r, scale.use_rslora))
        return ProxyGain(option, *mean_and_error(self.train(alone)))

    def _held_out_losses(self, model: torch.nn.Module) -> np.ndarray:
        with torch.no_grad():
            return np.concatenate([self.loss(model(**x.inputs), x).double().cpu().numpy() for x in self.held_out])


def measure_proxies(
    trainer: Callable[[], ProxyTrainer],
    spec: ModelSpec,
    config: RunConfig,
    saved: SavedProxies | None,
    progress: Progress,
) -> ProxyStudy:
    """The gains of the planned options, as far as the time limit allows; finished ones are not trained again.

    Args:
        trainer: makes the trainer when the first option must be trained.
        spec: the model's layers.
        config: how many options, steps and so on.
        saved: where gains are kept, from the first one on.
        progress: called after every option.

    Raises:
        ProfilingError: a training diverged, or the time limit ended the study before enough options were trained.
    """
    settings = config.profiling.proxies
    plan = plan_proxies(spec, enumerate_options(spec, config.optimization.ranks()), settings.options)
    earlier = study_from_json(saved.restore().get("study")) if saved else None
    known = {gain.option: gain for gain in earlier.gains} if earlier else {}
    gains: list[ProxyGain] = []
    start = time.perf_counter()
    with progress.stage("Training proxies", total=len(plan)) as advance:
        for option in plan:
            if option not in known:
                if settings.time_limit_s is not None and time.perf_counter() - start > settings.time_limit_s:
                    break
                known[option] = trainer().gain(option)
                earlier = ProxyStudy(
                    gains=tuple(known.values()),
                    planned=len(plan),
                    steps=settings.steps,
                    learning_rate=settings.learning_rate,
                    held_out_samples=len(trainer().base_losses),
                    base_loss=float(trainer().base_losses.mean()),
                )
                if saved:
                    saved.keep(study=study_to_json(earlier))
            gains.append(known[option])
            advance(1)
    if earlier is None or len(gains) < min(MIN_GAINS, len(plan)):
        raise ProfilingError(
            f"profiling.proxies.time_limit_s: {settings.time_limit_s:g} s were enough for {len(gains)} of {len(plan)} "
            f"options, and a curve needs {MIN_GAINS}; raise it, or train fewer profiling.proxies.steps"
        )
    return replace(earlier, gains=tuple(gains), planned=len(plan))


def joint_gains(
    trainer: Callable[[], ProxyTrainer],
    chosen: Manifest,
    uniform: Manifest,
    saved: SavedProxies | None,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """The whole choice, and the one that treats all layers alike, trained as the proxies were.

    Returns:
        "loss_drop" and "uniform_loss_drop", each with predicted, measured, relative_error and standard_error, and
        "loss_drop_over_uniform", the paired difference with its standard_error.
    """
    key = json.dumps([each.choice.rows() for each in (chosen, uniform)])
    measured_drops = saved.restore().get("joint", {}).get(key) if saved else None
    if measured_drops is None:
        with progress.stage("Training the choice like the proxies", total=2) as advance:
            drops = []
            for manifest in (chosen, uniform):
                drops.append(trainer().train(manifest.choice))
                advance(1)
        measured_drops = [mean_and_error(drops[0]), mean_and_error(drops[1]), mean_and_error(drops[0] - drops[1])]
        if saved:
            saved.keep(joint={key: measured_drops})
    result: dict[str, dict[str, float]] = {}
    for name, manifest, (measured, error) in zip(
        ("loss_drop", "uniform_loss_drop"), (chosen, uniform), measured_drops[:2], strict=True
    ):
        predicted = float(manifest.predicted.gain or 0.0)
        relative = (predicted - measured) / measured if measured else 0.0
        result[name] = {
            "predicted": predicted, "measured": measured, "relative_error": relative, "standard_error": error
        }  # fmt: skip
    return result | {
        "loss_drop_over_uniform": {"measured": measured_drops[2][0], "standard_error": measured_drops[2][1]}
    }


def mean_and_error(differences: np.ndarray) -> tuple[float, float]:
    """Mean of paired differences and its standard error."""
    return float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(len(differences)))


def _losses_on(batch: Batch, loss: Loss, model: torch.nn.Module) -> torch.Tensor:
    return loss(model(**batch.inputs), batch)
