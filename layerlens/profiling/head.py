"""Fitting a new task head on frozen features, so that gradients are those of the task and not of random numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from layerlens.exceptions import ProfilingError
from layerlens.integrations.transformers import frozen_part
from layerlens.tasks import Batch, Loss, logits_of
from layerlens.tasks.losses import classification_loss
from layerlens.utils.progress import Progress

RIDGE = 1e-3
MAX_ITERATIONS = 200


def fit_head(
    model: torch.nn.Module,
    new_parameters: Sequence[str],
    batches: Sequence[Batch],
    progress: Progress,
    loss_of: Loss = classification_loss,
) -> float:
    """Fit the new head in place by ridge-penalised maximum likelihood (L-BFGS on cached features); its final mean loss.

    Only the parameters in ``new_parameters`` change. Deterministic for a given model, data and thread count.

    Raises:
        ProfilingError: a transformer block has new parameters, the features are not finite, or the fit diverges.
    """
    batches = list(batches)  # they may be made anew each time they are asked for
    frozen = [model.get_submodule(path) for path in frozen_part(model, new_parameters)]
    features = _features(model, frozen[-1], batches, progress)
    parameters = [model.get_parameter(name) for name in new_parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=MAX_ITERATIONS, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        pairs = zip(batches, features, strict=True)
        losses = [loss_of(_replayed(model, frozen, batch, output), batch) for batch, output in pairs]
        penalty = RIDGE * sum((parameter**2).sum() for parameter in parameters)
        value = torch.cat(losses).mean() + penalty
        value.backward()
        return value

    optimizer.step(loss)
    final = float(loss().detach())
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    if not final < float("inf"):
        raise ProfilingError(f"fitting the task head diverged (loss {final}); set model.head_fit_samples: 0")
    return final


def _features(
    model: torch.nn.Module, module: torch.nn.Module, batches: Sequence[Batch], progress: Progress
) -> list[Any]:
    """What ``module`` puts out for every batch, computed once."""
    features: list[Any] = []
    handle = module.register_forward_hook(lambda module, args, output: features.append(output))
    try:
        with progress.stage("Fitting the task head", total=len(batches)) as advance, torch.no_grad():
            for batch in batches:
                if not torch.isfinite(logits_of(model(**batch.inputs))).all():
                    raise ProfilingError(
                        "the model's outputs are not finite (NaN or infinity) on the data; look for NaN weights"
                    )
                advance(1)
    finally:
        handle.remove()
    return features


def _replayed(model: torch.nn.Module, frozen: Sequence[torch.nn.Module], batch: Batch, output: Any) -> Any:
    """The model's output for ``batch`` with ``output`` in place of computing the frozen modules."""
    with _returning(frozen, output):
        return model(**batch.inputs)


@contextmanager
def _returning(modules: Sequence[torch.nn.Module], output: Any) -> Iterator[None]:
    """While open, calling any of ``modules`` returns ``output``."""
    for module in modules:
        module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # the class's own method is found again
