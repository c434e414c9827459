"""Laws of a set of layers: from its share of the raw gradient energy to the share of uniform LoRA's gain that it keeps.

Every law has one or two constants. They are fitted on the training tasks of the study, each task left out in turn, and
the residuals of the tasks that were left out give the width of the interval. The tasks of ``FIXED`` are only judged.

    share = Σ e^q · √min(rank, rank of uniform LoRA) / the same sum of uniform LoRA
    reach = Σ e^q of all blocks from the lowest adapted one up / Σ e^q of all
    s = w · reach + (1 − w) · share
    root:        √s, without a constant
    power:       s^p
    saturating:  (1 + c) s / (c + s)
    exponential: (1 − exp(−s/c)) / (1 − exp(−1/c))

times min(1, trainable parameters as a share of uniform LoRA's)^q.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from real_tasks import FIXED
from scipy.optimize import minimize_scalar
from scipy.stats import spearmanr

from layerlens.evaluation.results import UNIFORM, ResultsFile
from layerlens.evaluation.study_report import markdown
from layerlens.utility.model import SURE

FOLDER = Path(__file__).parent / "results" / "real"
LAWS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "root": lambda s, _: s**0.5,
    "power": lambda s, p: s**p,
    "saturating": lambda s, c: (1.0 + c) * s / (c + s),
    "exponential": lambda s, c: (1.0 - np.exp(-s / c)) / (1.0 - np.exp(-1.0 / c)),
}
EXPONENTS = (0.5, 1.0)
"""Of the energy: 1 is raw, 0.25 the fourth root that the default takes."""
REACHES = (0.0, 0.3, 0.5, 0.8, 1.0)
"""w of the law: how much counts what lies above the lowest adapted block, which a low adapter can do the work of."""
FILLS = (0.0, 0.15)
"""q of the law."""
PRODUCT = ("root", 1.0, 0.0, 0.0)
"""What the product has: the root of the raw energy's share. Laws with w and q predict given choices better, but what
they find is worse (w = 0.8) or as good (w = 0.3); see docs/decisions/utility.md."""
WORTH = 0.02
"""Of root mean square error: a constant that does less is not worth having."""
WEIGHT_FLOOR = 0.1
"""Standard error that is added to a pair's own, so that no exact pair decides alone."""
COVERED = 0.9
"""Share of the pairs of tasks that were left out whose figures the interval is made to hold."""


@dataclass(frozen=True)
class Pair:
    """One choice on one task.

    Args:
        task, arm: which.
        energy__l: float64, of every layer.
        block__l: int64, its block; -1 outside the blocks.
        weight__l: float64, √rank of the choice's layers, at most uniform LoRA's.
        uniform__l: the same of uniform LoRA.
        filled: its trainable parameters as a share of uniform LoRA's, at most 1.
        kept, error: measured, with its standard error.
    """

    task: str
    arm: str
    energy__l: np.ndarray
    block__l: np.ndarray
    weight__l: np.ndarray
    uniform__l: np.ndarray
    filled: float
    kept: float
    error: float

    def share(self, exponent: float, reach: float = 0.0) -> float:
        """s of the law."""
        powered = self.energy__l**exponent
        own = float((powered * self.weight__l).sum() / (powered * self.uniform__l).sum())
        above = self.block__l >= self.block__l[self.weight__l > 0].min()
        return reach * float(powered[above].sum() / powered.sum()) + (1.0 - reach) * own


def pairs_of(measured: Mapping[str, Mapping[str, Any]]) -> list[Pair]:
    """All choices but uniform LoRA of all tasks whose layers were measured; the same choice counts once for a task."""
    found = []
    for task, arms in measured.items():
        record = ResultsFile.open(FOLDER / f"{task}.jsonl").select(kind="layers")
        if not record:
            continue
        layers = record[-1]["layers"]
        uniform = arms[UNIFORM].ranks
        most = max(uniform.values())
        seen = [dict(uniform)]
        for arm, one in arms.items():
            if dict(one.ranks) in seen:
                continue
            seen.append(dict(one.ranks))
            low, high = one.interval
            n = len(one.drop)
            found.append(
                Pair(
                    task, arm,
                    np.array([layer["energy"] for layer in layers.values()]),
                    np.array([-1 if layer["block"] is None else layer["block"] for layer in layers.values()]),
                    np.sqrt([min(one.ranks.get(name, 0), most) for name in layers]),
                    np.sqrt([uniform.get(name, 0) for name in layers]),
                    min(1.0, _params(layers, one.ranks) / _params(layers, uniform)),
                    one.kept,
                    (high - low) / 2 / _t(n),
                )
            )  # fmt: skip
    return found


def _params(layers: Mapping[str, Any], ranks: Mapping[str, int]) -> float:
    return float(sum(layer["cost"] * ranks.get(name, 0) for name, layer in layers.items()))


def _t(n: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, n - 1))


def fit(law: str, exponent: float, reach: float, fill: float, pairs: Sequence[Pair]) -> float:
    """The constant of least weighted squares."""
    filled = np.array([pair.filled for pair in pairs]) ** fill
    s = np.array([pair.share(exponent, reach) for pair in pairs])
    kept = np.array([pair.kept for pair in pairs])
    weight = 1.0 / (WEIGHT_FLOOR**2 + np.array([pair.error for pair in pairs]) ** 2)

    def loss(log_constant: float) -> float:
        return float((weight * (filled * LAWS[law](s, float(np.exp(log_constant))) - kept) ** 2).sum())

    grid = np.linspace(np.log(0.01), np.log(10.0), 60)
    start = int(np.argmin([loss(value) for value in grid]))
    low, high = grid[max(start - 1, 0)], grid[min(start + 1, len(grid) - 1)]
    return float(np.exp(minimize_scalar(loss, bounds=(low, high), method="bounded").x))


def predictions(key: tuple[str, float, float, float], constant: float, pairs: Sequence[Pair]) -> np.ndarray:
    """What a law with this constant says of pairs."""
    law, exponent, reach, fill = key
    filled = np.array([pair.filled for pair in pairs]) ** fill
    return filled * LAWS[law](np.array([pair.share(exponent, reach) for pair in pairs]), constant)


def left_out(law: str, exponent: float, reach: float, fill: float, pairs: Sequence[Pair]) -> np.ndarray:
    """Predictions of every pair by the constant of the other tasks."""
    predicted = np.zeros(len(pairs))
    for task in dict.fromkeys(pair.task for pair in pairs):
        constant = fit(law, exponent, reach, fill, [pair for pair in pairs if pair.task != task])
        own = [index for index, pair in enumerate(pairs) if pair.task == task]
        predicted[own] = predictions((law, exponent, reach, fill), constant, [pairs[index] for index in own])
    return predicted


def judged(pairs: Sequence[Pair], predicted: np.ndarray) -> tuple[float, float, float]:
    """(Spearman over all pairs, mean of that within tasks, root mean square error)."""
    kept = np.array([pair.kept for pair in pairs])
    inside = []
    for task in dict.fromkeys(pair.task for pair in pairs):
        own = [index for index, pair in enumerate(pairs) if pair.task == task]
        if len(own) > 2:
            inside.append(spearmanr(predicted[own], kept[own]).statistic)
    return (
        float(spearmanr(predicted, kept).statistic), float(np.nanmean(inside)),
        float(np.sqrt(np.mean((predicted - kept) ** 2))),
    )  # fmt: skip


def widths(pairs: Sequence[Pair], predicted: np.ndarray) -> tuple[float, float]:
    """(below, above): residuals, as shares of ``room``, between which ``COVERED`` of the pairs lie."""
    scaled = np.array([pair.kept for pair in pairs]) - predicted
    scaled = scaled / room(predicted)
    tail = (1.0 - COVERED) / 2.0
    n = len(scaled)
    rank = min(n - 1, int(np.ceil((1.0 - tail) * (n + 1))) - 1)  # of split conformal prediction
    ordered = np.sort(scaled)
    return float(-ordered[n - 1 - rank]), float(ordered[rank])


def room(predicted: np.ndarray) -> np.ndarray:
    """How far a prediction can be off: what is said to be nearly all is known better than what is said to be half."""
    return SURE + np.abs(1.0 - predicted)


def covered(pairs: Sequence[Pair], predicted: np.ndarray, below: float, above: float) -> float:
    """Share of the pairs within the interval."""
    kept, size = np.array([pair.kept for pair in pairs]), room(predicted)
    return float(np.mean((kept >= predicted - below * size) & (kept <= predicted + above * size)))


def nested_coverage(law: str, exponent: float, reach: float, fill: float, pairs: Sequence[Pair]) -> float:
    """Coverage on each task of the interval that the other tasks gave, by pairs."""
    hits = []
    for task in dict.fromkeys(pair.task for pair in pairs):
        others = [pair for pair in pairs if pair.task != task]
        own = [pair for pair in pairs if pair.task == task]
        below, above = widths(others, left_out(law, exponent, reach, fill, others))
        constant = fit(law, exponent, reach, fill, others)
        predicted = predictions((law, exponent, reach, fill), constant, own)
        hits += [covered([pair], predicted[i : i + 1], below, above) for i, pair in enumerate(own)]
    return float(np.mean(hits))


def law_sections(measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Markdown: every law on the training tasks, each left out in turn, and the chosen one on the fixed tasks."""
    pairs = pairs_of(measured)
    training = [pair for pair in pairs if pair.task not in FIXED]
    fixed = [pair for pair in pairs if pair.task in FIXED]
    if len({pair.task for pair in training}) < 3:
        return []
    rows, scores = [], {}
    for key in product(LAWS, EXPONENTS, REACHES, FILLS):
        of_all, within, error = judged(training, left_out(*key, training))
        scores[key] = error
        law, exponent, reach, fill = key
        constant = "–" if law == "root" else f"{fit(*key, training):.3g}"
        held = f"{nested_coverage(*key, training):.2f}"
        figures = [f"{of_all:.2f}", f"{within:.2f}", f"{error:.2f}", held]
        rows.append([law, f"{exponent:g}", f"{reach:g}", f"{fill:g}", constant, *figures])
    header = ["law", "energy to the power", "w", "q", "constant", "Spearman", "within tasks", "error", "interval holds"]
    sections = [
        f"## Predicted kept share: {len(training)} pairs of {len({p.task for p in training})} training tasks, each "
        f"task left out in turn\n\n{markdown(header, rows)}"
    ]
    best = min(scores, key=lambda key: scores[key])
    sections.append(_section("The product's law", PRODUCT, training, fixed))
    if scores[best] < scores[PRODUCT] - WORTH:
        sections.append(_section("The law of least error", best, training, fixed))
    return sections


def _section(title: str, key: tuple[str, float, float, float], training: Sequence[Pair], fixed: Sequence[Pair]) -> str:
    """A law on the training tasks, each left out, and on the fixed ones, with the interval of the training tasks."""
    law, exponent, reach, fill = key
    constant, predicted = fit(*key, training), left_out(*key, training)
    below, above = widths(training, predicted)
    text = (
        f"## {title}: {law}, energy to the power {exponent:g}, w {reach:g}, q {fill:g}"
        + ("" if law == "root" else f", constant {constant:.3g}")
        + f"\n\nThe interval is k − {below:.3f}·({SURE} + |1 − k|) to k + {above:.3f}·({SURE} + |1 − k|).\n\n"
    )
    rows = [_row(pair, k) for pair, k in zip(training, predicted, strict=True)]
    if fixed:
        of_fixed = predictions(key, constant, fixed)
        of_all, within, error = judged(fixed, of_fixed)
        text += (
            f"On the fixed tasks: Spearman {of_all:.2f} over {len(fixed)} pairs, {within:.2f} within tasks, error "
            f"{error:.2f}; the interval holds {covered(fixed, of_fixed, below, above):.2f} of them.\n\n"
        )
        rows += [_row(pair, k, " (fixed)") for pair, k in zip(fixed, of_fixed, strict=True)]
    return text + markdown(["task", "choice", "share", "reach", "parameters", "predicted", "kept"], rows)


def _row(pair: Pair, predicted: float, note: str = "") -> list[str]:
    return [
        pair.task + note, pair.arm, f"{pair.share(1.0):.2f}", f"{pair.share(1.0, 1.0):.2f}", f"{pair.filled:.2f}",
        f"{predicted:.2f}",
        f"{pair.kept:.2f} ± {pair.error:.2f}",
    ]  # fmt: skip
