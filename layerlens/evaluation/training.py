"""Training the stacked arms with AdamW, measuring them, and the search for each allocation's learning rate."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerlens.evaluation.results import ResultsFile, chosen_rate
from layerlens.evaluation.stacks import Arm, LayerStack, LoraStack
from layerlens.evaluation.study_task import Samples, StudyTask
from layerlens.tasks import logits_of
from layerlens.tuning.short_training import run_steps

BETAS = (0.9, 0.999)
EPSILON = 1e-8
HEAD_LEARNING_RATE = 1e-3
"""One for all arms, so that an arm's rate is that of its adapters alone."""
SCALE = 2.0
"""alpha/r, one constant for all arms and layers, as LayerLens exports it."""
EVALUATION_ROWS = 256
MAX_EXTENSIONS = 4
"""Learning rates that are added beyond an end of the grid, as long as the end is the best."""


@dataclass(frozen=True)
class Run:
    """What one arm reached.

    Args:
        validation_loss, test_loss: mean loss of a sample, or of a token.
        validation_metric, test_metric: share of labels predicted right.
        wall_s, cpu_s: time of the group that the arm was trained in, divided by its arms, evaluation not counted.
        tokens_per_s: positions of the arm's batches divided by that time.
    """

    validation_loss: float
    test_loss: float
    validation_metric: float
    test_metric: float
    wall_s: float
    cpu_s: float
    tokens_per_s: float


def data_order(n_samples: int, n_wanted: int, seed: int) -> torch.Tensor:
    """int64 [n_wanted]: one permutation of the samples after the other."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-n_wanted // n_samples)
    return torch.cat([torch.randperm(n_samples, generator=generator) for _ in range(epochs)])[:n_wanted]


class StackedAdam:
    """Adam without weight decay; parameters have the arms first, and every arm has its own learning rate."""

    def __init__(self, parameters: Sequence[torch.Tensor], rates: Sequence[torch.Tensor]) -> None:
        self.parameters = list(parameters)
        self.rates = list(rates)
        self.first = [torch.zeros_like(parameter) for parameter in parameters]
        self.second = [torch.zeros_like(parameter) for parameter in parameters]
        self.n_steps = 0

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update with all rates times ``factor``; gradients are gone afterwards."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        assert len(gradients) == len(self.parameters)
        self.n_steps += 1
        torch._foreach_lerp_(self.first, gradients, 1.0 - BETAS[0])
        torch._foreach_mul_(self.second, BETAS[1])
        torch._foreach_addcmul_(self.second, gradients, gradients, 1.0 - BETAS[1])
        denominators = torch._foreach_div(self.second, 1.0 - BETAS[1] ** self.n_steps)
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, EPSILON)
        updates = torch._foreach_div(self.first, denominators)
        size = -factor / (1.0 - BETAS[0] ** self.n_steps)
        for parameter, update, rate in zip(self.parameters, updates, self.rates, strict=True):
            parameter.addcmul_(update, rate, value=size)
            parameter.grad = None


def train(
    task: StudyTask,
    arms: Sequence[Arm],
    *,
    steps: int | None = None,
    layer_stack: Callable[[str, Any, Sequence[Arm]], Any] = LayerStack,
    evaluate_test: bool = True,
    measure: bool = True,
) -> list[Run]:
    """Train every arm on the task and measure it; the model is unchanged afterwards.

    Args:
        task: what to train on.
        arms: all are trained together.
        steps: the task's own unless given.
        layer_stack: how a layer is adapted.
        evaluate_test: False leaves the test losses NaN.
        measure: False leaves all losses NaN.
    """
    steps = steps or task.steps
    stack = LoraStack(task.model, arms, heads=task.heads, scale=SCALE, layer_stack=layer_stack)
    order__ks = torch.stack([data_order(len(task.train), steps * task.batch_size, arm.seed) for arm in arms])

    def loss(step: int) -> torch.Tensor:
        columns = slice(step * task.batch_size, (step + 1) * task.batch_size)
        batch = task.train.rows(order__ks[:, columns].flatten())
        losses = task.loss(task.model(**batch.inputs), batch).view(len(arms), -1)
        counts = task.label_count(batch.labels).view(len(arms), -1)
        penalties = sum(layer.penalty() for layer in stack.layers if hasattr(layer, "penalty"))
        return (losses.sum(dim=1) / counts.sum(dim=1)).sum() + penalties

    def after_backward() -> None:
        for layer in stack.layers:
            if hasattr(layer, "after_backward"):
                layer.after_backward()

    def after_step(step: int) -> None:
        if hasattr(layer_stack, "after_step"):
            layer_stack.after_step(stack.layers, step, steps)

    unknown = [(float("nan"), float("nan"))] * len(arms)
    with stack.attached():
        started, cpu_started = time.perf_counter(), time.process_time()
        run_steps(steps, loss, _optimizer(stack, arms).step, after_backward=after_backward, after_step=after_step)
        wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
        validation = measure_arms(task, task.validation, len(arms)) if measure else unknown
        test = measure_arms(task, task.test, len(arms)) if measure and evaluate_test else unknown
    positions = task.train.labels[:1].numel() if isinstance(task.train.labels, torch.Tensor) else 1
    tokens_per_s = positions * order__ks.numel() / wall_s
    return [
        Run(validation[k][0], test[k][0], validation[k][1], test[k][1], wall_s / len(arms), cpu_s / len(arms),
            tokens_per_s)
        for k in range(len(arms))
    ]  # fmt: skip


def _optimizer(stack: LoraStack, arms: Sequence[Arm]) -> StackedAdam:
    rates__k = torch.tensor([arm.learning_rate for arm in arms])
    parameters, rates = [], []
    for layer in stack.layers:
        for parameter in layer.parameters():
            parameters.append(parameter)
            rates.append(rates__k[layer.arms].view(-1, *[1] * (parameter.dim() - 1)))
    for head in stack.heads.values():
        parameters += head.parameters()
        rates += [torch.tensor(HEAD_LEARNING_RATE)] * len(head.parameters())
    return StackedAdam(parameters, rates)


@torch.no_grad()
def measure_arms(task: StudyTask, samples: Samples, n_arms: int) -> list[tuple[float, float]]:
    """(mean loss, share right) of every arm on ``samples``; the arms' stack must be attached."""
    size = max(1, EVALUATION_ROWS // n_arms)
    total, right, counted = torch.zeros(n_arms), torch.zeros(n_arms), 0.0
    for start in range(0, len(samples), size):
        index = torch.arange(start, min(start + size, len(samples)))
        batch = samples.rows(index.repeat(n_arms))
        output = task.model(**batch.inputs)
        total += task.loss(output, batch).view(n_arms, -1).sum(dim=1)
        right += _right(task, output, batch.labels).view(n_arms, -1).sum(dim=1)
        counted += float(task.label_count(batch.labels).sum()) / n_arms
    return [(float(t) / counted, float(r) / counted) for t, r in zip(total, right, strict=True)]


def _right(task: StudyTask, output: Any, labels: Any) -> torch.Tensor:
    """float [b]: labels of each sample that are predicted right; 0 where labels are no classes."""
    if task.right is not None:
        return task.right(output, labels)
    if not isinstance(labels, torch.Tensor):
        return torch.zeros(len(labels))
    if labels.is_floating_point() and labels.dim() == 1:  # numbers
        return torch.zeros(len(labels))
    logits = logits_of(output)
    if labels.is_floating_point():  # a 0 or 1 for each class
        same = logits.shape == labels.shape
        return ((logits > 0) == (labels > 0.5)).float().mean(dim=1) if same else torch.zeros(len(labels))
    if task.spans:
        return (logits.argmax(dim=1) == labels).all(dim=1).float()
    predicted = logits.argmax(dim=-1)
    if predicted.shape != labels.shape:
        return torch.zeros(len(labels))
    if task.shifted:
        predicted, labels = predicted[:, :-1], labels[:, 1:]
    return (predicted == labels).view(len(labels), -1).sum(dim=1).float()


def run_allocation(
    task: StudyTask,
    results: ResultsFile,
    key: str,
    ranks: Mapping[str, int],
    *,
    inits: Mapping[str, torch.Tensor] | None = None,
    layer_stack: Callable[[str, Any, Sequence[Arm]], Any] = LayerStack,
    train_arms: Callable[..., list[Run]] = train,
) -> None:
    """Do the runs of the allocation that the results lack, by ``train`` or by ``train_arms``, which is called like it.

    The grid is the task's; while its lowest or highest rate is the best, it is extended by its own factor.
    """
    grid = [_rounded(rate) for rate in sorted(task.learning_rates)]
    factor = grid[1] / grid[0]
    for _ in range(MAX_EXTENSIONS + 1):
        wanted = [(rate, seed) for rate in grid for seed in task.sweep_seeds]
        _run_missing(task, results, key, ranks, wanted, inits or {}, layer_stack, train_arms)
        best = chosen_rate(results.select(kind="run", key=key), task.sweep_seeds)
        if best == grid[0]:
            grid = [_rounded(grid[0] / factor), *grid]
        elif best == grid[-1]:
            grid = [*grid, _rounded(grid[-1] * factor)]
        else:
            break
    _run_missing(task, results, key, ranks, [(best, seed) for seed in task.seeds], inits or {}, layer_stack, train_arms)


def _rounded(value: float) -> float:
    """To four digits, as a file has it."""
    return float(f"{value:.4g}")


def _run_missing(
    task: StudyTask,
    results: ResultsFile,
    key: str,
    ranks: Mapping[str, int],
    wanted: Sequence[tuple[float, int]],
    inits: Mapping[str, torch.Tensor],
    layer_stack: Callable[[str, Any, Sequence[Arm]], Any],
    train_arms: Callable[..., list[Run]],
) -> None:
    done = {(run["lr"], run["seed"]) for run in results.select(kind="run", key=key)}
    missing = [pair for pair in wanted if pair not in done]
    for start in range(0, len(missing), task.arms_at_once):
        group = missing[start : start + task.arms_at_once]
        runs = train_arms(task, [Arm(ranks, seed, rate, inits) for rate, seed in group], layer_stack=layer_stack)
        results.append(
            {"kind": "run", "task": task.name, "key": key, "lr": rate, "seed": seed, "steps": task.steps}
            | {name: float(f"{value:.6g}") for name, value in dataclasses.asdict(run).items()}
            for (rate, seed), run in zip(group, runs, strict=True)
        )
