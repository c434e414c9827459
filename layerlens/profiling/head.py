"""Fitting a new task head on frozen features, so that gradients are those of the task and not of random numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from layerlens.exceptions import ProfilingError
from layerlens.integrations.transformers import frozen_part
from layerlens.profiling.batches import Batch
from layerlens.profiling.losses import Loss, classification_loss
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
    frozen = [model.get_submodule(path) for path in frozen_part(model, new_parameters)]
    features = _features(model, frozen[-1], batches, progress)
    widened = _widen(model, frozen)
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
    for parameter, dtype in widened:
        parameter.data = parameter.data.to(dtype)
    if not final < float("inf"):
        raise ProfilingError(f"fitting the task head diverged (loss {final}); set model.head_fit_samples: 0")
    return final


def _features(
    model: torch.nn.Module, module: torch.nn.Module, batches: Sequence[Batch], progress: Progress
) -> list[Any]:
    """What ``module`` puts out for every batch, computed once."""
    features: list[Any] = []
    handle = module.register_forward_hook(lambda module, args, output: features.append(_as_float32(output)))
    try:
        with progress.stage("Fitting the task head", total=len(batches)) as advance, torch.no_grad():
            for batch in batches:
                if not torch.isfinite(model(**batch.inputs).logits).all():
                    raise ProfilingError(
                        "the model's outputs are not finite (NaN or infinity) on the data; look for NaN weights"
                    )
                advance(1)
    finally:
        handle.remove()
    return features


def _widen(model: torch.nn.Module, frozen: Sequence[torch.nn.Module]) -> list[tuple[torch.nn.Parameter, torch.dtype]]:
    """Make half-precision weights outside the frozen modules float32; these weights and what they were.

    L-BFGS compares losses that differ by less than half precision can tell; widening and narrowing changes no bit of
    the other weights.
    """
    inside = {id(parameter) for module in frozen for parameter in module.parameters()}
    widened = []
    for parameter in model.parameters():
        if id(parameter) not in inside and parameter.dtype in (torch.float16, torch.bfloat16):
            widened.append((parameter, parameter.dtype))
            parameter.data = parameter.data.float()
    return widened


def _as_float32(output: Any) -> Any:
    """A module's output with half-precision tensors as float32."""
    if isinstance(output, torch.Tensor):
        return output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
    if isinstance(output, tuple):
        return tuple(map(_as_float32, output))
    if isinstance(output, dict):  # transformers' ModelOutput, which is made from its fields
        return type(output)(**{name: _as_float32(value) for name, value in output.items()})
    return output


def _replayed(model: torch.nn.Module, frozen: Sequence[torch.nn.Module], batch: Batch, output: Any) -> torch.Tensor:
    """Logits [b, classes] of ``batch`` with ``output`` in place of computing the frozen modules."""
    with _returning(frozen, output):
        return model(**batch.inputs).logits


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
