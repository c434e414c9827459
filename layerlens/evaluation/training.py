"""Training the stacked arms with AdamW, and measuring them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerlens.evaluation.lora_stack import Arm, LayerStack, LoraStack
from layerlens.evaluation.study_task import Samples, StudyTask
from layerlens.tasks import logits_of

BETAS = (0.9, 0.999)
EPSILON = 1e-8
WARMUP_SHARE = 0.1
HEAD_LEARNING_RATE = 1e-3
"""One for all arms, so that an arm's rate is that of its adapters alone."""
SCALE = 2.0
"""alpha/r, one constant for all arms and layers, as LayerLens exports it."""
EVALUATION_ROWS = 256


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


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps, then linear decay to 0; ``step`` counts from 0."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    return (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup)


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
    stack = LoraStack(task.model, arms, head=task.head, scale=SCALE, layer_stack=layer_stack)
    optimizer = _optimizer(stack, arms)
    order__ks = torch.stack([data_order(len(task.train), steps * task.batch_size, arm.seed) for arm in arms])
    nothing = [(float("nan"), float("nan"))] * len(arms)
    n_tokens, training_s, cpu_s = 0, 0.0, 0.0
    with stack.attached():
        for step in range(steps):
            started, cpu_started = time.perf_counter(), time.process_time()
            columns = slice(step * task.batch_size, (step + 1) * task.batch_size)
            batch = task.train.rows(order__ks[:, columns].flatten())
            losses = task.loss(task.model(**batch.inputs), batch).view(len(arms), -1)
            counts = task.label_count(batch.labels).view(len(arms), -1)
            loss = (losses.sum(dim=1) / counts.sum(dim=1)).sum()
            loss = loss + sum(layer.penalty() for layer in stack.layers if hasattr(layer, "penalty"))
            loss.backward()
            for layer in stack.layers:
                if hasattr(layer, "after_backward"):
                    layer.after_backward()
            optimizer.step(schedule(step, steps))
            if hasattr(layer_stack, "after_step"):
                layer_stack.after_step(stack.layers, step, steps)
            n_tokens += batch.labels.numel()
            training_s += time.perf_counter() - started
            cpu_s += time.process_time() - cpu_started
        validation = measure_arms(task, task.validation, len(arms)) if measure else nothing
        test = measure_arms(task, task.test, len(arms)) if measure and evaluate_test else nothing
    return [
        Run(validation[k][0], test[k][0], validation[k][1], test[k][1], training_s / len(arms),
            cpu_s / len(arms), n_tokens / training_s)
        for k in range(len(arms))
    ]  # fmt: skip


def _optimizer(stack: LoraStack, arms: Sequence[Arm]) -> StackedAdam:
    rates__k = torch.tensor([arm.learning_rate for arm in arms])
    parameters, rates = [], []
    for layer in stack.layers:
        for parameter in layer.parameters():
            parameters.append(parameter)
            rates.append(rates__k[layer.arms].view(-1, *[1] * (parameter.dim() - 1)))
    if stack.head is not None:
        parameters += stack.head.parameters()
        rates += [torch.tensor(HEAD_LEARNING_RATE)] * len(stack.head.parameters())
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
        right += _right(task, logits_of(output), batch.labels).view(n_arms, -1).sum(dim=1)
        counted += float(task.label_count(samples.labels[index]).sum())
    return [(float(t) / counted, float(r) / counted) for t, r in zip(total, right, strict=True)]


def _right(task: StudyTask, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """float [b]: labels of each sample that are predicted right; 0 where labels are no classes."""
    if task.spans:
        return (logits.argmax(dim=1) == labels).all(dim=1).float()
    predicted = logits.argmax(dim=-1)
    if labels.is_floating_point():
        return torch.zeros(len(labels))
    if task.shifted:
        predicted, labels = predicted[:, :-1], labels[:, 1:]
    return (predicted == labels).view(len(labels), -1).sum(dim=1).float()
