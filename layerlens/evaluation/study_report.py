"""The study as a reader sees it: Markdown tables and SVG plots, made from the results files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from layerlens.evaluation.results import (
    UNIFORM,
    ArmResult,
    ResultsFile,
    arm_results,
    baseline_loss,
    bootstrap_interval,
    normalised_gain,
    t_interval,
)

EXPLANATION = """# Study

Test loss (mean ± standard error over paired seeds) of every arm at the learning rate that validation chose for it. The
gain is (L_uniform − L_arm) / (L_without adapters − L_uniform): 0 is as good as tuned uniform LoRA. Intervals are 95 %
paired bootstrap intervals over seeds; "better / worse" counts tasks whose paired 95 % t interval excludes 0.
"""

Gains = dict[str, dict[str, np.ndarray]]
"""arm -> task -> normalised gain [seeds]."""


def gains_at(
    files: Mapping[str, ResultsFile], budget: str, reference_budget: str
) -> tuple[dict[str, dict[str, ArmResult]], Gains]:
    """(task -> arm -> result, arm -> task -> gain over uniform LoRA at ``reference_budget``)."""
    tables = {task: arm_results(results, budget) for task, results in files.items()}
    gains: Gains = {}
    for task, results in files.items():
        uniform = arm_results(results, reference_budget).get(UNIFORM)
        for arm, result in tables[task].items():
            if uniform is not None:
                gains.setdefault(arm, {})[task] = normalised_gain(result, uniform, baseline_loss(results))
    return tables, gains


def gain_table(files: Mapping[str, ResultsFile], budget: str, reference_budget: str, tasks: Sequence[str]) -> str:
    """Markdown: one line for each arm, best first; arms that lack a task come last."""
    tables, gains = gains_at(files, budget, reference_budget)
    header = ["arm", *tasks, "mean gain [95 %]", "better / worse"]
    complete = [arm for arm in gains if set(tasks) <= set(gains[arm])]
    incomplete = [arm for arm in gains if arm not in complete]

    def mean_of(arm: str) -> float:
        return float(np.mean([gain.mean() for gain in gains[arm].values()]))

    rows = []
    for arm in [*sorted(complete, key=mean_of, reverse=True), *sorted(incomplete)]:
        cells = [arm]
        for task in tasks:
            result = tables.get(task, {}).get(arm)
            if result is None:
                cells.append("–")
                continue
            error = result.test_loss.std(ddof=1) / np.sqrt(len(result.test_loss))
            cells.append(f"{result.test_loss.mean():.3f} ± {error:.3f}")
        cells += [interval_cell(gains[arm], tasks, arm), _signs(gains[arm], arm, budget == reference_budget)]
        rows.append(cells)
    return markdown(header, rows)


def interval_cell(gain: Mapping[str, np.ndarray], tasks: Sequence[str], arm: str) -> str:
    """Mean gain over the tasks that ``gain`` has, with its interval."""
    known = {task: gain[task] for task in tasks if task in gain}
    if arm == UNIFORM and all(not values.any() for values in known.values()):
        return "0"
    low, high = bootstrap_interval(known)
    mean = np.mean([values.mean() for values in known.values()])
    note = "" if len(known) == len(tasks) else f" ({len(known)} tasks)"
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]{note}"


def _signs(gain: Mapping[str, np.ndarray], arm: str, same_budget: bool) -> str:
    if arm == UNIFORM and same_budget:
        return ""
    intervals = [t_interval(values) for values in gain.values()]
    better, worse = sum(low > 0.0 for low, _ in intervals), sum(high < 0.0 for _, high in intervals)
    return f"{better} / {worse}"


def write_gain_plot(
    files: Mapping[str, ResultsFile], budget: str, path: Path, tasks: Sequence[str], labels: Mapping[str, str]
) -> None:
    """SVG: mean normalised gain of every complete arm with its interval, and its tasks as points."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    _, gains = gains_at(files, budget, budget)
    complete = [arm for arm in gains if set(tasks) <= set(gains[arm]) and arm != UNIFORM]
    complete.sort(key=lambda arm: float(np.mean([gains[arm][task].mean() for task in tasks])))
    figure = Figure(figsize=(7.0, 1.1 + 0.3 * len(complete)))
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for row, arm in enumerate(complete):
        of_tasks = {task: gains[arm][task] for task in tasks}
        low, high = bootstrap_interval(of_tasks)
        points = [values.mean() for values in of_tasks.values()]
        axes.plot([low, high], [row, row], color="#1f4e79", linewidth=2)
        axes.plot(points, [row] * len(points), "o", color="#9bb7d4", markersize=4, zorder=1)
        axes.plot(np.mean(points), row, "D", color="#1f4e79", markersize=5)
    axes.axvline(0.0, color="#888888", linewidth=0.8)
    axes.set_yticks(range(len(complete)), [labels.get(arm, arm) for arm in complete])
    axes.set_xlabel(f"normalised gain over tuned uniform LoRA\n({budget} budget; points: tasks, bar: 95 % interval)")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "layerlens"}):  # ids from the content, so that the same data give the same bytes
        figure.savefig(path, format="svg", metadata={"Date": None})


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def study_markdown(files: Mapping[str, ResultsFile], budgets: Sequence[str]) -> str:
    """The report of `layerlens evaluate`: a table of gains for each budget."""
    sections = []
    for budget in budgets:
        sections.append(f"## Budget {budget}\n\n{gain_table(files, budget, budget, list(files))}")
    return EXPLANATION + "\n" + "\n".join(sections)
