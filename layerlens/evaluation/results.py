"""The results of a study, and what they say: paired gains over tuned uniform LoRA with their intervals.

Runs are JSON lines that are only ever appended to, so that an interrupted study goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from layerlens.exceptions import DataError
from layerlens.faults import StudyFault
from layerlens.models import LORA

Record = dict[str, Any]
UNIFORM = "uniform"
N_BOOTSTRAP = 10_000


def allocation_key(ranks: Mapping[str, int], kind: str = LORA) -> str:
    """A short name of an allocation: arms that choose the same one share its runs."""
    text = json.dumps([kind, sorted(ranks.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass
class ResultsFile:
    """One task's records.

    Kinds of record: "arm" (what an arm chose at a budget), "run" (one fine-tune), "reference" (the frozen model, full
    fine-tuning), "single" (one layer adapted alone) and "profile".
    """

    path: Path
    records: list[Record] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path) -> ResultsFile:
        """The file's records; none where it is not there. A last line that was cut off is removed from it.

        Raises:
            DataError: another line is not a JSON object.
        """
        results = cls(path)
        if results.refresh():
            whole = path.read_text(encoding="utf-8").rpartition("\n")
            path.write_text(whole[0] + whole[1], encoding="utf-8")
        return results

    def refresh(self) -> bool:
        """Read the file again, to which another process may have added; whether its last line is cut off.

        Raises:
            DataError: another line is not a JSON object.
        """
        self.records = []
        if not self.path.is_file():
            return False
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            if number == len(lines) and not line.endswith("\n"):
                return True
            try:
                self.records.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self.path}:{number}: not a JSON object ({error}); remove the line").of(
                    StudyFault.DAMAGED
                ) from error
        return False

    def append(self, records: Iterable[Record]) -> None:
        """Add records to the file, all in one write."""
        added = list(records)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record) + "\n" for record in added))
        self.records += added

    def select(self, **values: Any) -> list[Record]:
        """Records that have all these values."""
        return [record for record in self.records if all(record.get(key) == value for key, value in values.items())]


def chosen_rate(runs: Sequence[Record], sweep_seeds: Sequence[int] = (0,)) -> float:
    """The learning rate with the least validation loss, averaged over the sweep's seeds; NaN counts as infinite."""
    losses: dict[float, list[float]] = defaultdict(list)
    for run in runs:
        if run["seed"] in sweep_seeds:
            losses[run["lr"]].append(run["validation_loss"])
    means = {rate: sum(values) / len(values) for rate, values in losses.items()}
    return min(means, key=lambda rate: means[rate] if math.isfinite(means[rate]) else math.inf)


@dataclass(frozen=True)
class ArmResult:
    """One arm's runs at the learning rate that validation chose.

    Args:
        test_loss: float64 [seeds].
        test_metric: the same.
        params: trainable parameters.
        learning_rate: the chosen one.
        adapted: layers with a rank.
    """

    test_loss: np.ndarray
    test_metric: np.ndarray
    params: int
    learning_rate: float
    adapted: int


def arm_results(results: ResultsFile, budget: str) -> dict[str, ArmResult]:
    """Arm -> result, of the arms whose runs are complete."""
    complete = {}
    seeds, sweep_seeds = study_seeds(results)
    for arm in results.select(kind="arm", budget=budget):
        runs = results.select(kind="run", key=arm["key"])
        if not runs:
            continue
        rate = chosen_rate(runs, sweep_seeds)
        by_seed = {run["seed"]: run for run in runs if run["lr"] == rate}
        if set(seeds) <= set(by_seed):
            complete[arm["arm"]] = ArmResult(
                np.array([by_seed[seed]["test_loss"] for seed in seeds]),
                np.array([by_seed[seed]["test_metric"] for seed in seeds]),
                arm["params"], rate, len(arm["ranks"]),
            )  # fmt: skip
    return complete


def study_seeds(results: ResultsFile) -> tuple[list[int], list[int]]:
    """(seeds of the paired runs, those of the sweep), as the study's last reference record has them."""
    reference = (results.select(kind="reference", name="frozen") or [{}])[-1]
    return reference.get("seeds", [0, 1, 2, 3, 4]), reference.get("sweep_seeds", [0])


def baseline_loss(results: ResultsFile) -> float:
    """Mean test loss without adapters: with the head trained alone, or of the frozen model where it has no head."""
    head = results.select(kind="reference", name="head")
    if head:
        return float(np.mean([record["test_loss"] for record in head]))
    return float(results.select(kind="reference", name="frozen")[0]["test_loss"])


def normalised_gain(result: ArmResult, uniform: ArmResult, baseline: float) -> np.ndarray:
    """(L_uniform − L_arm) / (L_baseline − mean L_uniform), float64 [seeds]: 0 is as good as uniform LoRA, 1 would be
    twice the improvement that it brings.
    """
    return (uniform.test_loss - result.test_loss) / (baseline - uniform.test_loss.mean())


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of paired differences."""
    half = student_t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def bootstrap_interval(gains: Mapping[str, np.ndarray], *, resample_tasks: bool = False) -> tuple[float, float]:
    """95 % paired bootstrap interval of the mean over tasks: seeds are resampled within every task, and with
    ``resample_tasks`` the tasks too (then it speaks of tasks like these, not of these).
    """
    generator = np.random.default_rng(0)
    table__ts = np.stack([gains[task] for task in sorted(gains)])
    n_tasks, n_seeds = table__ts.shape
    seeds = generator.integers(n_seeds, size=(N_BOOTSTRAP, n_tasks, n_seeds))
    drawn = np.take_along_axis(np.broadcast_to(table__ts, seeds.shape), seeds, axis=2).mean(axis=2)
    if resample_tasks:
        drawn = np.take_along_axis(drawn, generator.integers(n_tasks, size=(N_BOOTSTRAP, n_tasks)), axis=1)
    low, high = np.quantile(drawn.mean(axis=1), (0.025, 0.975))
    return float(low), float(high)
