"""What the baselines measure: mean gradients and the inputs' covariances, by plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from layerlens.evaluation.study_task import StudyTask
from layerlens.models import LayerSpec
from layerlens.tasks import Batch


@dataclass(frozen=True)
class LayerGradient:
    """Mean gradient [n_out, n_in] of a layer's weight, the weight, and the covariance [n_in, n_in] of its inputs."""

    gradient: torch.Tensor
    weight: torch.Tensor
    input_covariance: torch.Tensor


def lora_layers(task: StudyTask) -> list[LayerSpec]:
    """The layers that can take LoRA."""
    return [layer for layer in task.spec.layers if "lora" in layer.methods]


def layer_gradients(task: StudyTask, batches: Sequence[Batch]) -> dict[str, LayerGradient]:
    """For every layer, over the calibration batches."""
    modules: dict[str, Any] = {layer.name: task.model.get_submodule(layer.name) for layer in lora_layers(task)}
    moments = {name: torch.zeros(module.weight.shape[1], module.weight.shape[1]) for name, module in modules.items()}
    sums = {name: torch.zeros(module.weight.shape[1]) for name, module in modules.items()}
    rows = dict.fromkeys(modules, 0)

    def hook(name: str) -> Callable[..., None]:
        def add(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            h = args[0].detach().reshape(-1, args[0].shape[-1])
            moments[name].addmm_(h.mT, h)
            sums[name] += h.sum(dim=0)
            rows[name] += len(h)

        return add

    n_samples = sum(len(batch.index) for batch in batches)
    try:
        with ExitStack() as stack:
            for name, module in modules.items():
                module.weight.requires_grad_(True)
                stack.callback(module.register_forward_pre_hook(hook(name)).remove)
            for batch in batches:
                (task.loss(task.model(**batch.inputs), batch).sum() / n_samples).backward()
        return {
            name: LayerGradient(
                module.weight.grad.clone(),
                module.weight.detach(),
                moments[name] / rows[name] - torch.outer(sums[name], sums[name]) / rows[name] ** 2,
            )
            for name, module in modules.items()
        }
    finally:
        for module in modules.values():
            module.weight.requires_grad_(False)
            module.weight.grad = None
