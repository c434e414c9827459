"""The tables of the study on real models, from ``results/real/*.jsonl``: ``results/real/study.md`` and the README's.

    python benchmarks/evaluation/real_tables.py

The kept share of an arm is its improvement over the head trained alone (over the frozen model where the head is frozen)
divided by that of tuned uniform LoRA, on test samples, seeds paired.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from real_tasks import DEPTH_ARMS, FIXED, TASKS

from layerlens.evaluation.results import N_BOOTSTRAP, UNIFORM, ResultsFile, chosen_rate, study_seeds, t_interval
from layerlens.evaluation.study_report import markdown
from layerlens.jobs.cheapest_check import kept_share
from layerlens.utils.atomic import atomic_write_text

FOLDER = Path(__file__).parent / "results" / "real"
README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- real models: begin -->", "<!-- real models: end -->"
IN_README = ("auto", "cheapest:0.95", "half", "top", "bottom")
ORDER = ("auto", "cheapest:0.95", "cheapest:0.85")
SHAPES = {
    "most": "uniform LoRA on the upper 4 of 6 blocks (3 of 4)",
    "half": "uniform LoRA on the upper 3 of 6 blocks (2 of 4)",
    "values": "on value and output projections of these",
    "top": "uniform LoRA on the upper block",
    "bottom": "uniform LoRA on the lower 2 blocks",
    "lowest": "uniform LoRA on the lowest block",
    "all-values": "uniform LoRA on all value and output projections",
    "low-values": "on those of the lower 3 of 6 blocks (2 of 4)",
    "reach-0.8:0.95": "cheapest:0.95 by reach, weight 0.8",
    "reach-0.3:0.95": "cheapest:0.95 by reach, weight 0.3",
}
"""What the arms by depth are in words; ``DEPTH_ARMS`` has them by model."""


@dataclass(frozen=True)
class Measured:
    """One arm on one task.

    Args:
        arm: its name.
        drop: float64 [seeds], improvement of the test loss.
        uniform: the same of uniform LoRA, of the same seeds.
        params: trainable parameters.
        rate: the chosen learning rate.
        ranks: by layer.
        predicted: what the product predicts: "kept", "cost_share", "step_ms", "vram_gb".
        cost: what was measured: "step_ms", "step_mb", "saved_mb".
        uniform_cost: the same of uniform LoRA.
    """

    arm: str
    drop: np.ndarray
    uniform: np.ndarray
    params: int
    rate: float
    ranks: Mapping[str, int]
    predicted: Mapping[str, float]
    cost: Mapping[str, float]
    uniform_cost: Mapping[str, float]

    @property
    def kept(self) -> float:
        """The share of uniform LoRA's improvement."""
        return float(self.drop.mean() / self.uniform.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % interval over paired seeds."""
        found = kept_share(self.drop, self.uniform)
        return found["kept_low"], found["kept_high"]

    def share(self, name: str) -> float:
        """What the arm costs, as a share of uniform LoRA; NaN where it was not measured."""
        return self.cost[name] / self.uniform_cost[name] if name in self.cost and self.uniform_cost else float("nan")


def measured_of(results: ResultsFile) -> dict[str, Measured]:
    """Arm -> what was measured, of the arms with runs; none where uniform LoRA does not improve anything."""
    sweep_seeds = study_seeds(results)[1]
    heads = {record["seed"]: record["test_loss"] for record in results.select(kind="reference", name="head")}
    frozen = results.select(kind="reference", name="frozen")[0]["test_loss"]
    found: dict[str, Any] = {}
    for record in results.select(kind="arm"):
        runs = results.select(kind="run", key=record["key"])
        if runs:
            rate = chosen_rate(runs, sweep_seeds)
            losses = {run["seed"]: run["test_loss"] for run in runs if run["lr"] == rate}
            found[record["arm"]] = (record, rate, losses)
    if UNIFORM not in found:
        return {}
    base = found[UNIFORM]
    measured = {}
    for arm, (record, rate, losses) in found.items():
        seeds = sorted(set(losses) & set(base[2]) & (set(heads) or set(losses)))
        if len(seeds) < 2:
            continue
        before = np.array([heads.get(seed, frozen) for seed in seeds])
        measured[arm] = Measured(
            arm,
            before - np.array([losses[seed] for seed in seeds]),
            before - np.array([base[2][seed] for seed in seeds]),
            record["params"],
            rate,
            record["ranks"],
            _one(results, "predicted", record["key"]),
            _one(results, "arm_cost", record["key"]),
            _one(results, "arm_cost", base[0]["key"]),
        )
    return measured


def _one(results: ResultsFile, kind: str, key: str) -> Mapping[str, float]:
    return (results.select(kind=kind, key=key) or [{}])[-1]


def all_measured() -> dict[str, dict[str, Measured]]:
    """Task -> arm -> what was measured."""
    found = {}
    for name in TASKS:
        results = ResultsFile.open(FOLDER / f"{name}.jsonl")
        if results.records and (of_task := measured_of(results)):
            found[name] = of_task
    return found


def shapes_of(task: str) -> dict[str, str]:
    """Arm -> what it is called over models of different depth: ``half`` is the upper half of the blocks."""
    layers = ResultsFile.open(FOLDER / f"{task}.jsonl").select(kind="layers")[-1]["layers"]
    arms = DEPTH_ARMS[len({layer["block"] for layer in layers.values()})]
    return {arm: shape for shape, arm in arms.items()}


def by_shape(measured: Mapping[str, Mapping[str, Measured]], tasks: Sequence[str]) -> dict[str, dict[str, Measured]]:
    """Shape -> task -> what was measured."""
    found: dict[str, dict[str, Measured]] = {}
    for task in tasks:
        shapes = shapes_of(task)
        for arm, one in measured[task].items():
            if arm != UNIFORM:
                found.setdefault(shapes.get(arm, arm), {})[task] = one
    return {shape: found[shape] for shape in (*ORDER, *SHAPES) if shape in found}


def mean_kept(of_tasks: Mapping[str, Measured]) -> tuple[float, float, float]:
    """Mean kept share over tasks with its 95 % bootstrap interval; tasks are resampled, and seeds within them."""
    generator = np.random.default_rng(0)
    shares = []
    for one in of_tasks.values():
        drawn = generator.integers(len(one.drop), size=(N_BOOTSTRAP, len(one.drop)))
        shares.append(one.drop[drawn].mean(axis=1) / one.uniform[drawn].mean(axis=1))
    table__tn = np.stack(shares)
    tasks = generator.integers(len(table__tn), size=(N_BOOTSTRAP, len(table__tn)))
    means = np.take_along_axis(table__tn.T, tasks, axis=1).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(np.mean([one.kept for one in of_tasks.values()])), float(low), float(high)


def kept_table(measured: Mapping[str, Mapping[str, Measured]], tasks: Sequence[str]) -> str:
    """Kept share of every arm on every task."""
    rows = []
    for shape, of_tasks in by_shape(measured, tasks).items():
        cells = [_cell(of_tasks[task]) if task in of_tasks else "–" for task in tasks]
        mean, low, high = mean_kept(of_tasks)
        note = "" if len(of_tasks) == len(tasks) else f" ({len(of_tasks)} tasks)"
        rows.append([_named(shape), *cells, f"{mean:.2f} [{low:.2f}, {high:.2f}]{note}"])
    return markdown(["arm", *tasks, "mean [95 %, tasks and seeds]"], rows)


def _cell(one: Measured) -> str:
    low, high = one.interval
    return f"{one.kept:.2f} [{low:.2f}, {high:.2f}]"


def _named(shape: str) -> str:
    return SHAPES.get(shape, shape)


def cost_table(measured: Mapping[str, Mapping[str, Measured]], tasks: Sequence[str]) -> str:
    """Step time (predicted by the product beside it) and saved activations of every arm, as shares of uniform LoRA."""
    rows = []
    for shape, of_tasks in by_shape(measured, tasks).items():
        cells = []
        for task in tasks:
            one = of_tasks.get(task)
            if one is None or not one.cost:
                cells.append("–")
                continue
            cells.append(
                f"{one.share('step_ms'):.2f} ({one.predicted.get('cost_share', float('nan')):.2f}); "
                f"{one.share('saved_mb'):.2f}"
            )
        rows.append([_named(shape), *cells])
    return markdown(["arm", *tasks], rows)


def base_table(measured: Mapping[str, Mapping[str, Measured]], tasks: Sequence[str]) -> str:
    """What uniform LoRA improves on every task."""
    rows = []
    for task in tasks:
        one = measured[task][UNIFORM]
        results = ResultsFile.open(FOLDER / f"{task}.jsonl")
        run = results.select(kind="run")[0]
        frozen = results.select(kind="reference", name="frozen")[0]
        error = one.drop.std(ddof=1) / len(one.drop) ** 0.5
        rows.append(
            [
                task + (" (fixed)" if task in FIXED else ""), f"{frozen['total_params']:,}", f"{one.params:,}",
                str(run["steps"]), str(len(one.drop)), f"{one.rate:g}", f"{frozen['test_loss']:.3f}",
                f"{one.drop.mean():.3f} ± {error:.3f}",
            ]
        )  # fmt: skip
    header = ["task", "model", "trained", "steps", "seeds", "rate", "frozen model's loss", "uniform LoRA's improvement"]
    return markdown(header, rows)


def summary_table(
    measured: Mapping[str, Mapping[str, Measured]], tasks: Sequence[str], only: Collection[str] = ()
) -> str:
    """Mean kept share, tasks that lose more than a twentieth for sure, step time and saved activations of each arm."""
    rows = []
    for shape, of_tasks in by_shape(measured, tasks).items():
        if only and shape not in only:
            continue
        mean, low, high = mean_kept(of_tasks)
        within = sum(one.interval[0] >= 0.95 for one in of_tasks.values())
        below = sum(one.interval[1] < 0.95 for one in of_tasks.values())
        steps = [one.share("step_ms") for one in of_tasks.values()]
        saved = [one.share("saved_mb") for one in of_tasks.values()]
        rows.append(
            [_named(shape), f"{mean:.2f} [{low:.2f}, {high:.2f}]", f"{within} / {below} of {len(of_tasks)}",
             _median(steps), _median(saved)]
        )  # fmt: skip
    header = ["choice", f"share of uniform LoRA's improvement, {len(tasks)} tasks [95 %]", "surely above / below 0.95",
              "step time", "saved activations"]  # fmt: skip
    return markdown(header, rows)


def _median(shares: Sequence[float]) -> str:
    """Of the tasks on which it was measured; – where it was on none."""
    known = [share for share in shares if np.isfinite(share)]
    return f"{np.median(known):.2f}" if known else "–"


def main() -> None:
    """Write everything."""
    from real_laws import law_sections

    measured = all_measured()
    tasks = [task for task, arms in measured.items() if t_interval(arms[UNIFORM].drop)[0] > 0.0]
    without = [task for task in measured if task not in tasks]
    training = [task for task in tasks if task not in FIXED]
    fixed = [task for task in tasks if task in FIXED]
    sections = [
        "# The study on real models",
        f"## Tasks\n\n{base_table(measured, list(measured))}",
        f"## Share of uniform LoRA's improvement that is kept: training tasks\n\n{kept_table(measured, training)}",
        f"## The same on the tasks that were fixed before\n\n{kept_table(measured, fixed)}",
        "## Costs as shares of uniform LoRA: step time measured (predicted); saved activations measured\n\n"
        + cost_table(measured, tasks),
        *law_sections({task: measured[task] for task in tasks}),
        f"## Summary\n\n{summary_table(measured, tasks)}",
    ]
    if without:
        sections.insert(
            2, f"On {' and '.join(without)} uniform LoRA improves nothing for sure, so there is no share of it to keep."
        )
    atomic_write_text(FOLDER / "study.md", "\n\n".join(sections))
    text = README.read_text(encoding="utf-8")
    if BEGIN in text:
        before, _, rest = text.partition(BEGIN)
        table = summary_table(measured, tasks, only=IN_README)
        atomic_write_text(README, before + BEGIN + "\n" + table + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
