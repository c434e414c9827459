"""A trained r x r matrix between frozen factors (LoRA-XS, arXiv 2405.17604; LoRA-SB, 2411.19557) beside uniform LoRA.

    OMP_NUM_THREADS=1 python benchmarks/evaluation/core_adapters.py fortune-topic snippet-kind

Both on every layer that the study adapts, heads frozen, AdamW with a linear decay, rates tried for each arm, the best
by validation loss. The factors are the leading singular vectors of the mean gradient of ``FACTORED`` training samples;
the start is the model itself. Results: ``results/core_adapters.json``.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import real_run  # noqa: F401  it loads scikit-learn's OpenMP first
import torch
from real_tasks import TASKS
from torch.nn import Linear, Module, Parameter
from torch.nn.functional import linear

from layerlens.evaluation.study_task import lora_layers

OUT = Path(__file__).parent / "results" / "core_adapters.json"
ARMS = {"lora": (1, 4), "core": (8, 20, 32)}
RATES = {"lora": (0.0016, 0.004, 0.01), "core": (0.004, 0.01, 0.025)}
SEEDS, FACTORED, SCALE = (0, 1, 2), 64, 2.0


class Adapted(Module):
    """A frozen Linear plus scale · B (C) A x, of which C is trained ("core"), or A and B are ("lora")."""

    def __init__(self, base: Linear, a: torch.Tensor, b: torch.Tensor, core: bool) -> None:
        super().__init__()
        self.base, rank = base, len(a)
        self.a, self.b = Parameter(a, requires_grad=not core), Parameter(b, requires_grad=not core)
        self.core = Parameter(torch.zeros(rank, rank)) if core else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = linear(x, self.a)
        return self.base(x) + SCALE * linear(low if self.core is None else linear(low, self.core), self.b)


def adapted(task: Any, kind: str, rank: int, seed: int, gradients: dict[str, torch.Tensor]) -> Module:
    """A copy of the model with the adapter on every layer."""
    model = copy.deepcopy(task.model).requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    for layer in lora_layers(task):
        base = model.get_submodule(layer.name)
        n_out, n_in = base.weight.shape
        if kind == "core":
            u, _, vh = torch.linalg.svd(gradients[layer.name], full_matrices=False)
            a, b = vh[:rank].contiguous(), u[:, :rank].contiguous()
        else:
            a, b = torch.randn(rank, n_in, generator=draw) / n_in**0.5, torch.zeros(n_out, rank)
        owner, _, name = layer.name.rpartition(".")
        setattr(model.get_submodule(owner), name, Adapted(base, a, b, kind == "core"))
    return model


def mean_gradients(task: Any) -> dict[str, torch.Tensor]:
    """The gradient of the mean loss in every layer's weight."""
    model = copy.deepcopy(task.model).eval().requires_grad_(False)
    weights = {layer.name: model.get_submodule(layer.name).weight.requires_grad_(True) for layer in lora_layers(task)}
    batch = task.train.rows(torch.arange(FACTORED))
    task.loss(model(**batch.inputs), batch).mean().backward()
    return {name: weight.grad for name, weight in weights.items()}


def loss_on(task: Any, model: Module, part: Any) -> float:
    with torch.no_grad():
        losses = [
            task.loss(model(**batch.inputs), batch) for batch in part.batches(torch.arange(len(part)), task.batch_size)
        ]
    return float(torch.cat(losses).mean())


def run(task: Any, kind: str, rank: int, rate: float, seed: int, gradients: Any) -> dict[str, Any]:
    """Train once."""
    started = time.process_time()
    model = adapted(task, kind, rank, seed, gradients).eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, task.steps)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(task.steps):
        batch = task.train.rows(torch.randint(len(task.train), (task.batch_size,), generator=draw))
        optimizer.zero_grad()
        task.loss(model(**batch.inputs), batch).mean().backward()
        optimizer.step()
        decay.step()
    return {
        "kind": kind, "rank": rank, "rate": rate, "seed": seed, "parameters": sum(one.numel() for one in trained),
        "validation": loss_on(task, model, task.validation), "test": loss_on(task, model, task.test),
        "cpu_s": round(time.process_time() - started, 1),
    }  # fmt: skip


def main() -> None:
    """Run what is asked for, and write each task when it is done."""
    torch.set_num_threads(1)
    found = json.loads(OUT.read_text()) if OUT.exists() else {}
    for name in sys.argv[1:]:
        task = TASKS[name]()
        gradients = mean_gradients(task)
        rows = []
        for kind, ranks in ARMS.items():
            for rank in ranks:
                runs = [run(task, kind, rank, rate, SEEDS[0], gradients) for rate in RATES[kind]]
                best = min(runs, key=lambda one: one["validation"])
                runs = [best, *(run(task, kind, rank, best["rate"], seed, gradients) for seed in SEEDS[1:])]
                tests = torch.tensor([one["test"] for one in runs])
                row = {
                    "kind": kind, "rank": rank, "parameters": best["parameters"], "rate": best["rate"],
                    "test": [round(float(x), 4) for x in tests], "mean_test": round(float(tests.mean()), 4),
                }  # fmt: skip
                print(name, row, flush=True)
                rows.append(row)
        found[name] = {"frozen": round(loss_on(task, task.model, task.test), 4), "steps": task.steps, "rows": rows}
        OUT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
