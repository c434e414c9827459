"""Tables that only our own study has, beside those of `layerlens evaluate`: Markdown, from the results files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from check_runs import checked_gain
from single_layers import reliability

from layerlens.evaluation.results import UNIFORM, ResultsFile, bootstrap_interval, t_interval
from layerlens.evaluation.study_report import gains_at, interval_cell, markdown

FROZEN = "frozen model"
"""Name of the model without adapters among the costs of arms."""


def open_results(folder: Path) -> dict[str, ResultsFile]:
    """Task -> its results, for every ``*.jsonl`` that has a reference."""
    found = {path.stem: ResultsFile.open(path) for path in sorted(folder.glob("*.jsonl"))}
    return {task: results for task, results in found.items() if results.select(kind="reference", name="frozen")}


def comparison_table(files: Mapping[str, ResultsFile], budget: str, arm: str, others: Sequence[str]) -> str:
    """Markdown: by how much ``arm`` is above each of the others, in normalised gain, on the tasks that both have."""
    _, gains = gains_at(files, budget, budget)
    rows = []
    for other in others:
        tasks = sorted(set(gains.get(arm, {})) & set(gains.get(other, {})))
        if not tasks:
            continue
        difference = {task: gains[arm][task] - gains[other][task] for task in tasks}
        low, high = bootstrap_interval(difference)
        wide = bootstrap_interval(difference, resample_tasks=True)
        intervals = [t_interval(values) for values in difference.values()]
        rows.append(
            [
                other,
                str(len(tasks)),
                f"{np.mean([values.mean() for values in difference.values()]):+.2f} [{low:+.2f}, {high:+.2f}]",
                f"[{wide[0]:+.2f}, {wide[1]:+.2f}]",
                f"{sum(low > 0 for low, _ in intervals)} / {sum(high < 0 for _, high in intervals)}",
            ]
        )
    header = [f"{arm} against", "tasks", "difference [95 %, seeds]", "[95 %, seeds and tasks]", "better / worse"]
    return markdown(header, rows)


def half_table(files: Mapping[str, ResultsFile], pairs: Sequence[tuple[str, str]], arms: Sequence[str]) -> str:
    """Markdown: arms at a budget against uniform LoRA at a larger one, task by task: gain [95 %]."""
    rows = []
    for budget, reference in pairs:
        _, gains = gains_at(files, budget, reference)
        for arm in arms:
            cells = []
            for task in files:
                values = gains.get(arm, {}).get(task)
                if values is None:
                    cells.append("–")
                    continue
                low, high = t_interval(values)
                cells.append(f"{values.mean():+.2f} [{low:+.2f}, {high:+.2f}]")
            if any(cell != "–" for cell in cells):
                rows.append([f"{arm} at {budget} against uniform at {reference}", *cells])
    return markdown(["", *files], rows)


def calibration_table(files: Mapping[str, ResultsFile]) -> str:
    """Markdown: Spearman of each utility model's prediction with measured single-layer gains, and its stability.

    The last line is how reliable the measurement itself is, where it was done with several seeds, and its root.
    """
    tasks = [task for task, results in files.items() if results.select(kind="calibration")]
    models: dict[str, dict[str, tuple[float, float, float, float]]] = {}
    for task in tasks:
        for record in files[task].select(kind="calibration"):
            models.setdefault(record["model"], {})[task] = (*record["spearman"], record["stability"][0])
    rows = []
    for model, found in models.items():
        if any(np.isnan(values[0]) for values in found.values()):
            continue
        cells = [
            f"{found[task][0]:.2f} [{found[task][1]:.2f}, {found[task][2]:.2f}] / {found[task][3]:.2f}"
            if task in found
            else "–"
            for task in tasks
        ]
        medians = [float(np.median([values[column] for values in found.values()])) for column in (0, 3)]
        rows.append((medians[0], [model, *cells, f"{medians[0]:.2f} / {medians[1]:.2f}"]))
    rows.sort(key=lambda row: -row[0])
    reliable = [reliability(files[task].select(kind="single")) for task in tasks]
    cells = ["–" if np.isnan(value) else f"{value:.2f} ({max(value, 0.0) ** 0.5:.2f})" for value in reliable]
    last = ["(the measurement itself, and the most that a prediction can reach)", *cells, ""]
    return markdown(["gain predicted [95 %] / stability", *tasks, "median"], [*(row for _, row in rows), last])


def cost_table(files: Mapping[str, ResultsFile], model: str) -> str:
    """Markdown: what profiling on so many samples and solving take, as a share of one fine-tune, and how well ranks of
    so many samples agree with those of as many others as the whole calibration set has.
    """  # fmt: skip
    rows = []
    for task, results in files.items():
        found = results.select(kind="cost", model=model)
        stable: dict[str, float] = {}
        for record in results.select(kind="calibration", model=model):
            stable |= record["against_fewer"] | {str(record["samples"]): record["stability"][0]}
        for record in found:
            own = {n: seconds + record["solve_s"] for n, seconds in record["profile_s"].items()}
            shares = {n: seconds / record["fine_tune_s"] for n, seconds in own.items()}
            per_sample = record["fine_tune_s"] / record["fine_tune_samples"]
            cells = [f"{share:.1%} / {stable[n]:.2f}" if n in stable else f"{share:.1%}" for n, share in shares.items()]
            enough = own[max(own, key=int)] / per_sample / 0.05
            rows.append(
                [task, str(record["fine_tune_samples"]), f"{record['fine_tune_s']:.2f} s", *cells, f"{enough:,.0f}"]
            )
    counts = sorted({int(n) for results in files.values() for record in results.select(kind="cost", model=model)
                     for n in record["profile_s"]})  # fmt: skip
    shares_of = [f"{n} samples" for n in counts]
    header = ["share of the fine-tune / stability of ranks", "samples trained on", "fine-tune", *shares_of]
    return markdown([*header, f"trained on for 5 % with {max(counts, default=0)}"], rows)


def arm_cost_table(files: Mapping[str, ResultsFile]) -> str:
    """Markdown: what each arm costs to serve and to train, relative to uniform LoRA of the same budget on each task:
    geometric mean over tasks.
    """  # fmt: skip
    columns = {"latency_ms": "latency, unmerged", "step_ms": "training step", "step_mb": "memory of a step"}
    found = {
        (record["budget"], record["arm"], task): record
        for task, results in files.items()
        for record in results.select(kind="arm_cost")
    }
    rows = []
    for budget, arm in dict.fromkeys((budget, arm) for budget, arm, _ in found if budget):
        tasks = [task for task in files if (budget, arm, task) in found and (budget, UNIFORM, task) in found]
        cells = []
        for column in columns:
            ratios = [found[budget, arm, task][column] / found[budget, UNIFORM, task][column] for task in tasks]
            spread = f" ({min(ratios):.2f} to {max(ratios):.2f})"
            cells.append("1" if arm == UNIFORM else f"{np.exp(np.mean(np.log(ratios))):.2f}{spread}")
        layers = [found["", FROZEN, task]["latency_ms"] / found[budget, arm, task]["latency_ms"] for task in tasks]
        rows.append([budget, arm, *cells, f"{np.exp(np.mean(np.log(layers))):.2f}"])
    header = ["budget", "arm", *(f"{name} / uniform" for name in columns.values()), "latency merged / unmerged"]
    return markdown(header, rows)


def run_time_table(files: Mapping[str, ResultsFile], budget: str, arms: Sequence[str]) -> str:
    """Markdown: mean processor time of one run, its share of the stacked group, evaluation not counted, by task."""
    rows = []
    for arm in arms:
        cells = []
        for results in files.values():
            chosen = results.select(kind="arm", budget=budget, arm=arm)
            runs = results.select(kind="run", key=chosen[-1]["key"]) if chosen else []
            timed = [(run["cpu_s"], run["tokens_per_s"]) for run in runs if "cpu_s" in run]
            seconds, tokens = np.mean(timed, axis=0) if timed else (0.0, 0.0)
            cells.append(f"{seconds:.2f} s, {tokens:,.0f}/s" if timed else "–")
        if set(cells) != {"–"}:
            rows.append([arm, *cells])
    return markdown(["processor time of a run, tokens per second of its group", *files], rows)


def solver_table(files: Mapping[str, ResultsFile]) -> str:
    """Markdown: gap to the proved bound of the first, greedy answer and of the last one."""
    rows = [
        [task, record["budget"], f"{record['greedy_gap']:.4%}", f"{record['gap']:.4%}"]
        for task, results in files.items()
        for record in results.select(kind="solver")
    ]
    return markdown(["task", "budget", "gap of the greedy answer", "gap after refinement"], rows)


def checked_table(
    files: Mapping[str, ResultsFile], budgets: Sequence[str], arms: Sequence[str], shares: Sequence[float]
) -> str:
    """Markdown: the first arm's gain over uniform LoRA, and the gain of what a check of the arms and uniform LoRA takes
    in every seed, with 95 % intervals and how often each is taken; at last the mean over tasks of each budget.
    """  # fmt: skip
    rows = []
    for budget in budgets:
        _, gains = gains_at(files, budget, budget)
        columns: list[dict[str, np.ndarray]] = [{} for _ in (1.0, *shares)]
        for task, results in files.items():
            found = [checked_gain(results, budget, arms, share) for share in shares]
            if task not in gains.get(arms[0], {}) or all(one is None for one in found):
                continue
            columns[0][task] = gains[arms[0]][task]
            cells = [_with_interval(columns[0][task])]
            for column, one in zip(columns[1:], found, strict=True):
                if one is None:
                    cells.append("–")
                    continue
                column[task] = one[0]
                cells.append(f"{_with_interval(one[0])}; {' + '.join(map(str, one[1].values()))}")
            rows.append([budget, task, *cells])
        rows.append(
            [budget, "mean", *(interval_cell(column, list(columns[0]), "") if column else "–" for column in columns)]
        )
    named = ["whole fine-tune" if share == 1.0 else f"{share:g} of the steps" for share in shares]
    return markdown(["budget", "task", f"{arms[0]}, unchecked", *(f"checked by a {name}" for name in named)], rows)


def _with_interval(gain: np.ndarray) -> str:
    if not gain.any():
        return "0"
    low, high = t_interval(gain)
    return f"{gain.mean():+.2f} [{low:+.2f}, {high:+.2f}]"
