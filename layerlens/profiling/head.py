"""Fitting a new task head on frozen features, so that gradients are those of the task and not of random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from layerlens.exceptions import ProfilingError
from layerlens.profiling.batches import Batch
from layerlens.utils.progress import Progress

RIDGE = 1e-3
MAX_ITERATIONS = 200


def head_module_of(new_parameters: Sequence[str]) -> str:
    """Path of the smallest module that holds all parameters that the checkpoint lacked."""
    owners = [name.rpartition(".")[0].split(".") for name in new_parameters]
    shared = owners[0]
    for owner in owners[1:]:
        length = 0
        while length < min(len(shared), len(owner)) and shared[length] == owner[length]:
            length += 1
        shared = shared[:length]
    return ".".join(shared)


def fit_head(
    model: torch.nn.Module, new_parameters: Sequence[str], batches: Sequence[Batch], progress: Progress
) -> float:
    """Fit the new head in place by ridge-penalised maximum likelihood (L-BFGS on cached features); its final mean loss.

    Only the parameters in ``new_parameters`` change. Deterministic for a given model, data and thread count.

    Raises:
        ProfilingError: the new parameters are not in one module below the model, the features are not finite, or
            the fit diverges.
    """
    path = head_module_of(new_parameters)
    if not path:
        raise ProfilingError(
            f"the checkpoint lacks parameters outside one task head ({', '.join(list(new_parameters)[:4])} ...); "
            "it is not a checkpoint of this architecture"
        )
    head = model.get_submodule(path)
    features, labels = _features(model, head, batches, progress)
    parameters = [model.get_parameter(name) for name in new_parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=MAX_ITERATIONS, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        data = torch.cat([head(feature) for feature in features])
        penalty = RIDGE * sum((parameter**2).sum() for parameter in parameters)
        value = torch.nn.functional.cross_entropy(data, labels) + penalty
        value.backward()
        return value

    optimizer.step(loss)
    final = float(loss().detach())
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    if not final < float("inf"):
        raise ProfilingError(f"fitting the task head {path!r} diverged (loss {final}); set model.head_fit_samples: 0")
    return final


def _features(
    model: torch.nn.Module, head: torch.nn.Module, batches: Sequence[Batch], progress: Progress
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What goes into the head for every batch, computed once."""
    features: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        features.append(args[0].detach())

    handle = head.register_forward_pre_hook(keep)
    try:
        with progress.stage("Fitting the task head", total=len(batches)) as advance, torch.no_grad():
            for batch in batches:
                model(**batch.inputs)
                if not torch.isfinite(features[-1]).all():
                    raise ProfilingError(
                        "the model's features are not finite (NaN or infinity) on the data; look for NaN weights"
                    )
                advance(1)
    finally:
        handle.remove()
    return features, torch.cat([batch.labels for batch in batches])
