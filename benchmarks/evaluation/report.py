"""Makes the study's tables and plots from ``results/*.jsonl``, and the short table in the README.

python benchmarks/evaluation/report.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from study_tables import (
    arm_cost_table,
    calibration_table,
    checked_table,
    comparison_table,
    cost_table,
    half_table,
    open_results,
    run_time_table,
    solver_table,
)

from layerlens.evaluation.results import (
    UNIFORM,
    ResultsFile,
    arm_results,
    baseline_loss,
    bootstrap_interval,
    chosen_rate,
    study_seeds,
    t_interval,
)
from layerlens.evaluation.study_report import EXPLANATION, gain_table, gains_at, markdown, write_gain_plot
from layerlens.utils.atomic import atomic_write_text

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"
BEGIN, END = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"
DEFAULT = "auto"
"""The arm of the default utility model."""
LABELS = {
    "even": "even (utility model uniform)",
    "auto": "auto (default)",
    "gora": "GoRA ranks",
    "eva": "EVA ranks",
    "adalora": "AdaLoRA",
}
TIMED = (UNIFORM, "tempered_energy", "tempered_log", "gora", "eva", "adalora")
CHECKED = (("auto",), ("tempered_log", "tempered_energy"))
SHARES = (0.25, 0.5, 1.0)
README_ARMS = (DEFAULT, "gora", "tempered_log", "signal", UNIFORM, "eva", "adalora")


def main() -> None:
    """Write everything."""
    files = open_results(FOLDER / "results")
    tasks = list(files)
    sections = [EXPLANATION]
    sections.append(
        f"## Tight budget: as much as rank 1 on every layer\n\n{gain_table(files, 'tight', 'tight', tasks)}"
    )
    others = (UNIFORM, "eva", "adalora", "gora", "tempered_log", "even_ranks", "tempered", "signal", "adam")
    sections.append(f"## The default against others\n\n{comparison_table(files, 'tight', DEFAULT, others)}")
    sections.append(f"## Four times as much\n\n{gain_table(files, 'loose', 'loose', tasks)}")
    pairs = (("half", "tight"), ("double", "loose"), ("tight", "loose"))
    arms = (DEFAULT, "tempered_energy", "tempered_log", "even_ranks", "tempered", "signal", "adam", "even")
    sections.append(f"## Half or a quarter of the parameters\n\n{half_table(files, pairs, arms)}")
    checked = "\n".join(checked_table(files, ("tight", "loose"), arms, SHARES) for arms in CHECKED)
    sections.append(f"## Uniform as a candidate of a check by short training\n\n{checked}")
    sections.append(f"## Prediction and stability\n\n{calibration_table(files)}")
    sections.append(f"## Cost\n\n{cost_table(files, 'tempered_energy')}")
    sections.append(f"## What the arms cost\n\n{arm_cost_table(files)}\n{run_time_table(files, 'tight', TIMED)}")
    sections.append(f"## Greedy against refined solver\n\n{solver_table(files)}")
    sections.append(f"## Full fine-tuning\n\n{_references(files)}")
    sections.append(f"## Models and budgets\n\n{_models(files)}")
    atomic_write_text(FOLDER / "results" / "study.md", "\n".join(sections))
    for budget in ("tight", "loose"):
        complete = [task for task in tasks if task in gains_at(files, budget, budget)[1].get(UNIFORM, {})]
        write_gain_plot(files, budget, FOLDER / "results" / f"gain-{budget}.svg", complete, LABELS)
    text = README.read_text(encoding="utf-8")
    if BEGIN in text:
        before, _, rest = text.partition(BEGIN)
        atomic_write_text(README, before + BEGIN + "\n" + readme_table(files) + END + rest.partition(END)[2])


def readme_table(files: dict[str, ResultsFile]) -> str:
    """One line for each arm: mean gain over its tasks, the interval, tasks significantly better / worse."""
    _, gains = gains_at(files, "tight", "tight")
    rows = []
    for arm in README_ARMS:
        found = gains.get(arm, {})
        if not found:
            continue
        if arm == UNIFORM:
            rows.append(["uniform LoRA, all linear layers", "0", ""])
            continue
        low, high = bootstrap_interval(found)
        intervals = [t_interval(values) for values in found.values()]
        mean = np.mean([values.mean() for values in found.values()])
        signs = f"{sum(a > 0 for a, _ in intervals)} / {sum(b < 0 for _, b in intervals)}"
        note = "" if set(found) == set(files) else f" ({len(found)} tasks)"
        rows.append([LABELS.get(arm, arm), f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]{note}", signs])
    header = ["allocation", f"gain over tuned uniform LoRA, {len(files)} tasks [95 %]", "tasks better / worse"]
    return markdown(header, rows)


def _references(files: dict[str, ResultsFile]) -> str:
    """Test loss without adapters, of the default at both budgets, and with every weight of the layers trained."""
    rows = []
    for task, results in files.items():
        at = {budget: arm_results(results, budget) for budget in ("tight", "loose")}
        cells = [f"{baseline_loss(results):.3f}"]
        cells += [f"{found[DEFAULT].test_loss.mean():.3f}" if DEFAULT in found else "–" for found in at.values()]
        full = results.select(kind="run", key="full")
        seeds, sweep_seeds = study_seeds(results)
        rate = chosen_rate(full, sweep_seeds) if full else None
        losses = [run["test_loss"] for run in full if run["lr"] == rate and run["seed"] in seeds]
        cells.append(f"{np.mean(losses):.3f} ± {np.std(losses, ddof=1) / len(losses) ** 0.5:.3f}" if losses else "–")
        rows.append([task, *cells])
    return markdown(
        ["task", "without adapters", f"{DEFAULT}, tight", f"{DEFAULT}, four times as much", "all weights"], rows
    )


def _models(files: dict[str, ResultsFile]) -> str:
    rows = []
    for task, results in files.items():
        frozen = results.select(kind="reference", name="frozen")[0]
        share = frozen["unit"] / frozen["total_params"]
        rows.append([task, f"{frozen['total_params']:,}", f"{frozen['unit']:,}", f"{share:.2%}"])
    return markdown(["task", "parameters of the model", "tight budget", "share"], rows)


if __name__ == "__main__":
    main()
