"""The proxy check with the margin turned round: the cheapest choice that training shows to be within it.

Uniform LoRA and the cheapest choices of several predicted shares are trained on the same batches, for at least half of
the fine-tune's steps: shorter trainings mislead about depth (docs/decisions/utility.md). The prediction says which
choices are tried, and the held-out losses say which one is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from layerlens.config import RunConfig
from layerlens.config.optimization import SCORE, UNIFORM_LORA
from layerlens.jobs.job import Warnings
from layerlens.jobs.proxy_check import Checked, as_checked, with_margin
from layerlens.jobs.solve import Solution
from layerlens.models import Saving
from layerlens.optimization.uniform import uniform_lora
from layerlens.tuning.steps import total_steps

SHARES = (0.85, 0.7, 0.5)
"""Predicted shares of uniform LoRA's improvement whose cheapest choices are trained beside that of the margin: on text
the prediction is often too low (the top 3 of 6 blocks kept 0.93 to 1.04)."""
LEAST_STEPS = 0.5
"""Share of the fine-tune's steps: after 25 % of them the ranking of choices was wrong (Spearman -0.25)."""
INTERVAL = 0.95


def with_enough_steps(config: RunConfig, samples: int, warnings: Warnings) -> RunConfig:
    """The configuration with at least half of the fine-tune's steps in the check; says so where it asked for fewer."""
    check, whole = config.optimization.proxy_check, total_steps(samples, config.training)
    least = int(np.ceil(LEAST_STEPS * whole))
    if check.steps >= least:
        return config
    warnings.add(
        f"optimization.proxy_check.steps: {check.steps} are fewer than half of the fine-tune's {whole} steps, and "
        f"shorter trainings mislead about what can be left out; the check uses {least}"
    )
    check = check.model_copy(update={"steps": least})
    return config.model_copy(update={"optimization": config.optimization.model_copy(update={"proxy_check": check})})


def candidates_of(
    solution: Solution,
    config: RunConfig,
    solved: Callable[[float], Solution],
    by_score: Callable[[], Solution],
) -> dict[str, Solution]:
    """What is trained, by name: uniform LoRA, the choice by score, and the cheapest choices that save something.

    Args:
        solution: of the margin; uniform LoRA where that saves nothing.
        config: has the margin.
        solved: the cheapest choice that keeps a share.
        by_score: the best score within the budgets.
    """
    found: dict[str, Solution] = {}
    asked = 1.0 - config.optimization.quality_margin
    for share in (asked, *(share for share in SHARES if share < asked)):
        each = solution if share == asked else solved(share)
        entries = each.problem.entries(each.allocation.choice).tolist()
        same = any(entries == other.problem.entries(other.allocation.choice).tolist() for other in found.values())
        if each.saving is not None and each.saving.saves and not same:
            found[f"cheapest-{100 * share:g}"] = each
    best = by_score()
    uniform = uniform_lora(best.problem, best.allocation)
    assert uniform is not None  # the reference of the cheapest choice fits the same budgets
    return {UNIFORM_LORA: replace(best, allocation=uniform, events=()), SCORE: best, **found}


def kept_share(drops: np.ndarray, of: np.ndarray) -> dict[str, float]:
    """The share of one mean loss drop in another, of the same samples, with its 95 % interval.

    The ratio of two means of n paired figures has the standard error of the mean of (one − ratio · other), over the
    other's mean (Cochran, Sampling Techniques, 2.11).
    """
    from scipy.stats import t

    kept = float(drops.mean() / of.mean())
    error = float((drops - kept * of).std(ddof=1) / np.sqrt(len(of)) / of.mean())
    width = float(t.ppf((1.0 + INTERVAL) / 2.0, len(of) - 1)) * error
    return {"kept": kept, "kept_low": kept - width, "kept_high": kept + width}


def cheapest_checked(
    predicted: Saving,
    solutions: Mapping[str, Solution],
    best: Mapping[str, tuple[float, np.ndarray]],
    config: RunConfig,
) -> tuple[Checked, Solution]:
    """The cheapest choice whose interval lies within the margin, or the better of uniform LoRA and the choice by score.

    Args:
        predicted: of the margin's own choice.
        solutions: of ``candidates_of``.
        best: of each that did not diverge its learning rate, and the loss drops of the samples.
        config: has the margin.
    """
    asked = 1.0 - config.optimization.quality_margin
    uniform = best[UNIFORM_LORA][1] if UNIFORM_LORA in best else np.zeros(1)
    savings = {name: each.saving for name, each in solutions.items() if each.saving is not None}
    shares: dict[str, dict[str, float]] = {}
    if uniform.mean() > 0.0:
        shares = {name: kept_share(best[name][1], uniform) for name in savings if name in best}
    within = [name for name, share in shares.items() if share["kept_low"] >= asked]
    chosen = min(within, key=lambda name: savings[name].cost_share, default="")
    if chosen:
        saving = replace(savings[chosen], measured={**shares[chosen], "asked": asked})
    else:
        chosen = max(
            (name for name in (SCORE, UNIFORM_LORA) if name in best),
            key=lambda name: with_margin(name, float(best[name][1].mean())),
            default=SCORE,
        )
        steps = config.optimization.proxy_check.steps
        saving = _nothing(predicted, shares, float(uniform.mean()), asked, chosen, steps)
    checked = as_checked(chosen, best, config) if chosen in best else Checked(chosen, {"chosen": chosen}, {})
    facts: dict[str, Any] = dict(checked.facts)
    for name, share in shares.items():
        facts[name] = {**facts[name], **share, "cost_share": savings[name].cost_share}
    return replace(checked, facts=facts), replace(solutions[chosen], saving=saving)


def _nothing(
    predicted: Saving,
    shares: Mapping[str, Mapping[str, float]],
    uniform: float,
    asked: float,
    chosen: str,
    steps: int,
) -> Saving:
    """The saving of the margin's own choice, which is not written, with the reason."""
    if uniform <= 0.0:
        reason = (
            f"uniform LoRA's held-out loss does not fall in {steps} steps (it changes by {-uniform:.2g}), so there is "
            "no improvement to keep"
        )
    elif not shares:
        reason = predicted.reason or "no cheaper choice could be trained: their losses were not finite"
    else:
        name = max(shares, key=lambda each: shares[each]["kept_low"])
        share = shares[name]
        reason = (
            f"after {steps} steps no cheaper choice is within the margin: the nearest, {name}, kept "
            f"{share['kept']:.0%} of uniform LoRA's held-out loss drop (95 %: {share['kept_low']:.0%} to "
            f"{share['kept_high']:.0%}), and the whole interval must be at least {asked:.0%}"
        )
    return replace(predicted, saves=False, reason=f"{reason}; {_in_words(chosen)} is written", written=chosen)


def _in_words(chosen: str) -> str:
    return "the choice with the best score" if chosen == SCORE else "uniform LoRA"


def told_of_cheapest(checked: Checked, solution: Solution) -> str:
    """What the check came to, as a line."""
    saving = solution.saving
    if saving is not None and saving.measured is not None:
        measured = saving.measured
        return (
            f"optimization.proxy_check: {checked.chosen} is written. It kept {measured['kept']:.0%} of uniform LoRA's "
            f"held-out loss drop (95 %: {measured['kept_low']:.0%} to {measured['kept_high']:.0%}) at "
            f"{saving.cost_share:.0%} of its cost"
        )
    return f"optimization.proxy_check: nothing to save: {'' if saving is None else saving.reason}"
