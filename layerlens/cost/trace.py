"""What a training step does, without doing it: every tensor operation and every allocation, on tensors without data.

The step runs on fake tensors (``torch._subclasses.FakeTensorMode``): shapes, strides and lifetimes are those of the
real step, so which activations are kept, and when they are freed, needs no rule of thumb. It takes no memory and works
for models that would not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from layerlens.integrations.operations import OperationRecorder, buffers_standing_still
from layerlens.integrations.transformers import full_batches
from layerlens.models.step import TracedOperation


@dataclass(frozen=True)
class StepTrace:
    """A traced step.

    Args:
        operations: in the order they ran.
        peak_bytes: largest sum of what was allocated and alive in it; weights, inputs and optimiser state not counted.
    """

    operations: tuple[TracedOperation, ...]
    peak_bytes: int

    @property
    def flops(self) -> float:
        """Matrix-product FLOPs of all operations."""
        return sum(operation.flops for operation in self.operations)


def trace_step(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], loss: Callable[[Any], torch.Tensor] | None = None
) -> StepTrace:
    """Forward and backward pass of ``model`` on ``batch``, traced; nothing of the model changes.

    Args:
        model: in the mode that is wanted.
        batch: keyword arguments of the model.
        loss: from its output to a scalar; its own loss unless given.
    """
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    recorder = OperationRecorder()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.random.fork_rng(devices=[]):
            inputs = {name: fake.from_tensor(tensor) for name, tensor in batch.items()}
            for parameter in model.parameters():
                parameter.grad = None
            with buffers_standing_still(model), full_batches(), recorder:
                # As in a training loop, nothing but the loss lives on when the backward pass begins.
                value = _own_loss(model(**inputs)) if loss is None else loss(model(**inputs))
                if value.requires_grad:
                    value.backward()
                del value
    finally:
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
    return StepTrace(tuple(recorder.operations), recorder.peak)


def _own_loss(output: Any) -> torch.Tensor:
    value: torch.Tensor = output.loss
    return value
