"""The proxy check: the solver's choice and other allocations trained beside each other, and the best one taken.

Theory ranks layers, and where it is wrong the choice can be worse than plain uniform LoRA. So complete allocations
within the same budgets are trained on training data, from one start and on the same batches, and compared on held-out
samples. What is trained is kept in the sensitivity cache, so that an interrupted check goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from layerlens.config import RunConfig
from layerlens.config.optimization import UNIFORM_LORA
from layerlens.data import Dataset
from layerlens.exceptions import DataError, ProfilingError
from layerlens.jobs.inputs import MIN_HELD_OUT
from layerlens.jobs.job import Warnings
from layerlens.jobs.proxies import ProxyTrainer, mean_and_error
from layerlens.jobs.solve import Solution
from layerlens.models import Choice
from layerlens.optimization import explain, uniform_lora
from layerlens.profiling.proxies import SavedProxies
from layerlens.utils.progress import Progress

CHOICE = "choice"
"""Name of the solver's own choice among the candidates."""
MARGIN = 0.02
"""By this share of its loss drop another allocation must be better than uniform LoRA: variants of LoRA lie within
1-2 % of it once learning rates are tuned (docs/decisions/utility.md), and below that it is as good a choice.
"""


@dataclass(frozen=True)
class Checked:
    """What the check found.

    Args:
        chosen: name of the best candidate.
        facts: for the manifest: of each candidate its loss drop with the standard error, and the learning rate that it
            was reached with.
        measured: the same for the summary and the report.
    """

    chosen: str
    facts: dict[str, Any]
    measured: dict[str, dict[str, float]]


def check_samples(dataset: Dataset, config: RunConfig, n_before: int, n_head: int) -> tuple[Dataset, Dataset]:
    """(training, held-out) samples: calibration samples and what follows them, never head or test samples.

    Args:
        dataset: all samples; the test split stays out.
        config: how many of each, and the seed.
        n_before: samples that are measured or that proxies are judged on.
        n_head: samples behind those that the head was fitted on.

    Raises:
        DataError: too few samples are left to judge on.
    """
    wanted = config.optimization.proxy_check
    n_asked = n_before + n_head + wanted.train_samples + wanted.held_out_samples
    together, _ = dataset.split(n_asked, 0, config.runtime.seed)
    usable = [index for index in range(len(together)) if not n_before <= index < n_before + n_head]
    n_held_out = min(wanted.held_out_samples, len(usable) // 3)
    n_train = min(wanted.train_samples, len(usable) - n_held_out)
    # Behind the measured samples where the data is large enough, and behind those that are trained on in any case.
    start = max(n_train, min(n_before, len(usable) - n_held_out))
    held_out = usable[start : start + n_held_out]
    if len(held_out) < MIN_HELD_OUT:
        raise DataError(
            f"optimization.proxy_check: the data leaves {len(held_out)} samples for evaluation, and {MIN_HELD_OUT} are "
            "needed; give more data or set optimization.proxy_check.steps: 0"
        )
    return together.select(usable[:n_train]), together.select(held_out)


def uniform_solution(solution: Solution) -> Solution | None:
    """Uniform LoRA within the budgets of ``solution``; None where none fits."""
    allocation = uniform_lora(solution.problem, solution.allocation)
    if allocation is None:
        return None
    return replace(
        solution, allocation=allocation, explanations=tuple(explain(solution.problem, allocation)), events=()
    )


def run_check(
    trainer: Callable[[], ProxyTrainer],
    candidates: Mapping[str, Choice],
    config: RunConfig,
    saved: SavedProxies | None,
    progress: Progress,
) -> Checked:
    """Train every candidate at every learning rate and name the one with the largest mean loss drop, where uniform LoRA
    counts as better by ``MARGIN``. The solver's choice is ``CHOICE``; arguments and errors as of ``train_candidates``.
    """
    best = train_candidates(trainer, candidates, config, saved, progress)
    chosen = max(best, key=lambda name: (with_margin(name, float(best[name][1].mean())), name == CHOICE))
    return as_checked(chosen, best, config)


def train_candidates(
    trainer: Callable[[], ProxyTrainer],
    candidates: Mapping[str, Choice],
    config: RunConfig,
    saved: SavedProxies | None,
    progress: Progress,
) -> dict[str, tuple[float, np.ndarray]]:
    """Train every candidate at every learning rate: the best rate of each, and the loss drops of the samples there.

    Args:
        trainer: makes the trainer when the first candidate must be trained.
        candidates: name -> what is trained. Equal allocations are trained once.
        config: the learning rates.
        saved: where loss drops are kept, from the first one on.
        progress: called after every training.

    Raises:
        ProfilingError: no candidate's loss was finite at any learning rate.
    """
    rates = config.optimization.proxy_check.learning_rates
    known: dict[str, list[float]] = dict(saved.restore().get("check", {})) if saved else {}
    best: dict[str, tuple[float, np.ndarray]] = {}
    with progress.stage("Training candidates", total=len(candidates) * len(rates)) as advance:
        for name, choice in candidates.items():
            for rate in rates:
                key = json.dumps([rate, choice.rows()])
                if key not in known:
                    known[key] = trainer().drops(choice, rate, decay=True).tolist()
                    if saved:
                        saved.keep(check=known)
                drops = np.array(known[key])
                if np.all(np.isfinite(drops)) and (name not in best or drops.mean() > best[name][1].mean()):
                    best[name] = (rate, drops)
                advance(1)
    if not best:
        raise ProfilingError(
            "optimization.proxy_check: no candidate's loss was finite after training; lower "
            f"optimization.proxy_check.learning_rates (they are {', '.join(f'{rate:g}' for rate in rates)})"
        )
    return best


def as_checked(chosen: str, best: Mapping[str, tuple[float, np.ndarray]], config: RunConfig) -> Checked:
    """What was found, for the manifest, the summary and the report."""
    facts: dict[str, Any] = {"chosen": chosen, "steps": config.optimization.proxy_check.steps}
    measured = {}
    for name, (rate, drops) in best.items():
        drop, error = mean_and_error(drops)
        over = mean_and_error(drops - best[chosen][1])
        facts[name] = {"loss_drop": drop, "standard_error": error, "learning_rate": rate,
                       "over_chosen": over[0], "over_chosen_standard_error": over[1]}  # fmt: skip
        measured[f"proxy_check_{name}"] = {"measured": drop, "standard_error": error}
    return Checked(chosen, facts, measured)


def with_margin(name: str, loss_drop: float) -> float:
    """What a candidate's loss drop counts as in the comparison."""
    return loss_drop + MARGIN * abs(loss_drop) if name == UNIFORM_LORA else loss_drop


def tell_of_check(checked: Checked, warnings: Warnings) -> None:
    """Say when another allocation than the solver's is written, and by how much it was better."""
    if checked.chosen == CHOICE:
        return
    if CHOICE in checked.facts:
        own = checked.facts[CHOICE]
        by = (
            f"was better by {own['over_chosen']:.2g} ± {own['over_chosen_standard_error']:.2g} per sample, where "
            f"{MARGIN:.0%} of uniform LoRA's loss drop are required"
            if own["over_chosen"] > 0.0
            else f"was worse by {-own['over_chosen']:.4g} ± {own['over_chosen_standard_error']:.2g} per sample"
        )
    else:
        by = "diverged"
    warnings.add(
        f"optimization.proxy_check: {checked.chosen} is written: after {checked.facts['steps']} steps the solver's "
        f"choice {by}. Gap and score are those of the prediction that the check overruled"
    )
