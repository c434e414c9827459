"""What each arm's allocation costs to train and to serve: step time, peak memory and latency of the real PEFT model.

    python benchmarks/evaluation/arm_costs.py digits-5-9

Appends to ``results/<task>.jsonl`` what is missing there. Times are processor time with one thread (what an idle
machine takes), memory is exact, from the allocator's events.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import pretrain  # noqa: F401  it makes torchvision importable, which PEFT imports
import torch
from peft import LoraConfig, get_peft_model
from run import RESULTS
from tasks import TASKS

from layerlens.cost.measure import peak_bytes, time_ms
from layerlens.evaluation.results import ResultsFile
from layerlens.evaluation.study_task import StudyTask
from layerlens.evaluation.training import SCALE
from layerlens.tasks import Batch

ARMS = ("uniform", "tempered_log", "tempered_energy", "signal", "gora", "eva")
BUDGETS = ("tight", "loose")
SERVED_SAMPLES = 32
SECONDS = 0.4


def with_lora(model: torch.nn.Module, ranks: dict[str, int]) -> torch.nn.Module:
    """A copy of the model with the ranks through stock PEFT, unmerged; the copy itself where there are none."""
    twin: Any = copy.deepcopy(model)
    if not ranks:
        return twin
    largest = max(ranks.values())
    config = LoraConfig(
        r=largest, lora_alpha=int(SCALE * largest), target_modules=list(ranks), lora_dropout=0.0,
        rank_pattern={f"^{name}$": rank for name, rank in ranks.items()},
        alpha_pattern={f"^{name}$": int(SCALE * rank) for name, rank in ranks.items()},
    )  # fmt: skip
    return get_peft_model(twin, config).eval()


def costs(task: StudyTask, ranks: dict[str, int]) -> dict[str, float]:
    """Latency of a batch unmerged, time and peak memory (above the weights) of one AdamW step, the head frozen."""
    model = with_lora(task.model, ranks)
    served, trained = (task.test.rows(torch.arange(n)) for n in (SERVED_SAMPLES, task.batch_size))

    def forward() -> None:
        with torch.no_grad():
            model(**served.inputs)

    found = {"latency_ms": time_ms(forward, seconds=SECONDS, cpu_time=True)}
    if ranks:
        step, state_bytes = _step(task, model, trained)
        found["step_ms"] = time_ms(step, seconds=SECONDS, cpu_time=True)
        found["step_mb"] = 1e-6 * (peak_bytes(step) + state_bytes)
    return found


def _step(task: StudyTask, model: torch.nn.Module, batch: Batch) -> tuple[Any, int]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)

    def step() -> None:
        optimizer.zero_grad()
        task.loss(model(**batch.inputs), batch).sum().backward()
        optimizer.step()

    return step, 2 * sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def main() -> None:
    """Every task that was named."""
    torch.set_num_threads(1)
    for name in sys.argv[1:] or TASKS:
        task, results = TASKS[name](), ResultsFile.open(RESULTS / f"{name}.jsonl")
        for budget, arm in (("", "frozen model"), *((budget, arm) for budget in BUDGETS for arm in ARMS)):
            chosen = results.select(kind="arm", budget=budget, arm=arm)
            if results.select(kind="arm_cost", budget=budget, arm=arm) or (budget and not chosen):
                continue
            found = costs(task, chosen[-1]["ranks"] if chosen else {})
            results.append([
                {"kind": "arm_cost", "task": name, "budget": budget, "arm": arm,
                 **{key: float(f"{value:.4g}") for key, value in found.items()}}
            ])  # fmt: skip
            print(name, budget, arm, found, flush=True)


if __name__ == "__main__":
    main()
