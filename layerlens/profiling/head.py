"""Fitting a new task head on frozen features, so that gradients are those of the task and not of random numbers.

The features are computed once: by the model itself, or block by block where its weights stay on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerlens import kernels
from layerlens.exceptions import ProfilingError
from layerlens.integrations.transformers import frozen_part, without_cache
from layerlens.integrations.ultralytics_head import is_detector
from layerlens.profiling.ridge import ridge_of, ridge_penalty
from layerlens.profiling.streamed.forward import ForwardSweep
from layerlens.profiling.streamed.on_disk import stream_directory
from layerlens.profiling.streamed.residency import Weights
from layerlens.tasks import Batch, Loss
from layerlens.tasks.losses import classification_loss, output_tensors
from layerlens.utils.progress import Progress

MAX_ITERATIONS = 200
DETECTOR_RATE, STEPS_ON_A_BATCH = 1e-2, 8
"""Of the training of a detector's head, or one of convolutions: Adam's first learning rate, and steps on the features
of one batch."""


def fit_head(
    model: torch.nn.Module,
    new_parameters: Sequence[str],
    batches: Sequence[Batch],
    progress: Progress,
    loss_of: Loss = classification_loss,
    replay: Replay | None = None,
) -> float:
    """Fit the new head in place by ridge-penalised maximum likelihood (L-BFGS on cached features); its final mean loss.

    The ridge is chosen by cross-validation (``ridge_of``): one that is too weak gives a head that is worse on other
    samples than one that says nothing.

    A detector's loss is not smooth (which boxes are compared depends on the scores), and a head of convolutions works
    at every place of an image: these are trained instead, in one pass over the data by Adam.

    Only the parameters in ``new_parameters`` change. Deterministic for a given model, data and thread count. ``replay``
    says how the frozen modules are computed, if not by calling the model.

    Raises:
        ProfilingError: a transformer block has new parameters, the features are not finite, or the fit diverges.
    """
    batches = list(batches)  # they may be made anew each time they are asked for
    replay = replay or _replay_of(model, new_parameters)
    if is_detector(model) or has_convolutions(model, new_parameters):
        return _trained(model, new_parameters, batches, progress, loss_of, replay)
    features = [_as_float32(found) for found in replay.features(batches, progress)]
    widened = _widen(model, replay.frozen)
    parameters = [model.get_parameter(name) for name in new_parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)

    def losses() -> torch.Tensor:
        pairs = zip(batches, features, strict=True)
        return torch.cat([loss_of(replay.output(batch, output), batch) for batch, output in pairs])

    ridge = ridge_of(losses, parameters)
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=MAX_ITERATIONS, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = losses().mean() + ridge_penalty(ridge, parameters)
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


def has_convolutions(model: torch.nn.Module, new_parameters: Sequence[str]) -> bool:
    """Whether a head has convolutions: it then sees all places of an image, too much for L-BFGS over all samples."""
    holders = {name.rpartition(".")[0] for name in new_parameters}
    return any(isinstance(model.get_submodule(path), torch.nn.modules.conv._ConvNd) for path in holders)


def _trained(
    model: torch.nn.Module, new_parameters: Sequence[str], batches: Sequence[Batch], progress: Progress,
    loss_of: Loss, replay: Replay,
) -> float:  # fmt: skip
    """Train new parameters by Adam, a few steps on the features of each batch in turn; the mean loss of the pass."""
    parameters = [model.get_parameter(name) for name in new_parameters]
    optimizer = torch.optim.Adam(parameters, lr=DETECTOR_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS_ON_A_BATCH * len(batches))
    losses = []
    with progress.stage("Fitting the task head", total=len(batches)) as advance:
        for batch in batches:
            with torch.no_grad():
                features, output = replay.run(batch)
            refuse_non_finite_logits(output)
            for parameter in parameters:
                parameter.requires_grad_(True)
            for _ in range(STEPS_ON_A_BATCH):
                optimizer.zero_grad()
                value = loss_of(replay.output(batch, features), batch).mean()
                value.backward()
                optimizer.step()
                schedule.step()
            losses.append(float(value.detach()))
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
            advance(1)
    final = float(np.mean(losses))
    if not np.isfinite(final):
        raise ProfilingError(f"fitting the task head diverged (loss {final}); set model.head_fit_samples: 0")
    return final


class Replay:
    """The model with its frozen modules computed once: calling any of them returns what the last of them put out."""

    def __init__(self, model: Any, new_parameters: Sequence[str]) -> None:
        self.model = model
        self.frozen = [model.get_submodule(path) for path in frozen_part(model, new_parameters)]

    def features(self, batches: Sequence[Batch], progress: Progress) -> list[Any]:
        """What the frozen modules put out for every batch, computed once."""
        found: list[Any] = []
        with progress.stage("Fitting the task head", total=len(batches)) as advance, torch.no_grad():
            for batch in batches:
                features, output = self.run(batch)
                refuse_non_finite_logits(output)
                found.append(features)
                advance(1)
        return found

    def run(self, batch: Batch) -> tuple[Any, Any]:
        """(features, output) of one batch."""
        found: list[Any] = []
        handle = self.frozen[-1].register_forward_hook(lambda module, args, output: found.append(output))
        try:
            output = self.model(**batch.inputs)
        finally:
            handle.remove()
        return found[-1], output

    def output(self, batch: Batch, features: Any) -> Any:
        """The model's output for ``batch`` with these features in place of computing the frozen modules."""
        with _returning(self.frozen, features):
            return self.model(**batch.inputs)


def refuse_non_finite_logits(output: Any) -> None:
    """Raise ProfilingError where the model overflows, before anything is fitted to its features."""
    for tensor in output_tensors(output):
        rows = tensor.detach().cpu()
        bad = np.count_nonzero(kernels.row_statistics(rows.reshape(len(rows), -1)).non_finite)
        if bad:
            raise ProfilingError(
                f"the model's outputs are not finite (NaN or infinity) on {bad} of {len(rows)} samples of the data; "
                "look for NaN weights"
            )


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
    if isinstance(output, (tuple, list)) and not hasattr(output, "_fields"):
        return type(output)(map(_as_float32, output))
    if isinstance(output, dict):  # transformers' ModelOutput, which is made from its fields
        return type(output)(**{name: _as_float32(value) for name, value in output.items()})
    return output


class _TimmReplay(Replay):
    """timm's models say themselves where their features end and their head begins, but not which weights are before."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.frozen = []

    def run(self, batch: Batch) -> tuple[Any, Any]:
        features = self.model.forward_features(*batch.inputs.values())
        return features, self.model.forward_head(features)

    def output(self, batch: Batch, features: Any) -> Any:
        return self.model.forward_head(features)


class _DetectorReplay(Replay):
    """A detector of ultralytics: its last module is the head, which takes a list of features."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.frozen = []

    def run(self, batch: Batch) -> tuple[Any, Any]:
        found: list[Any] = []
        handle = self.model.model[-1].register_forward_pre_hook(lambda module, args: found.append([*args[0]]))
        try:
            output = self.model(**batch.inputs)
        finally:
            handle.remove()
        return found[-1], output

    def output(self, batch: Batch, features: Any) -> Any:
        return self.model.model[-1](list(features))


class _RecordedReplay(Replay):
    """A model of which nothing is known: its largest modules without new parameters, as far as they are called before
    the first one with some; each call returns again what it returned.
    """

    def __init__(self, model: Any, new_parameters: Sequence[str]) -> None:
        self.model = model
        holders = {name.rpartition(".")[0] for name in new_parameters}
        self.heads = [model.get_submodule(path) for path in holders]
        around = {path.rsplit(".", cut)[0] for path in holders for cut in range(path.count(".") + 1)} | {""}
        self.frozen = []
        opened = set(around)
        for path, module in model.named_modules():
            if path in around or path.rpartition(".")[0] not in opened:
                continue
            if isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict)):  # never called itself
                opened.add(path)
            else:
                self.frozen.append(module)

    def run(self, batch: Batch) -> tuple[Any, Any]:
        calls: list[list[Any]] = [[] for _ in self.frozen]
        reached: list[bool] = []
        handles = [head.register_forward_pre_hook(lambda module, args: reached.append(True)) for head in self.heads]
        for module, found in zip(self.frozen, calls, strict=True):
            handles.append(
                module.register_forward_hook(
                    lambda module, args, output, found=found: None if reached else found.append(output)
                )
            )
        try:
            output = self.model(**batch.inputs)
        finally:
            for handle in handles:
                handle.remove()
        return tuple(map(tuple, calls)), output

    def output(self, batch: Batch, features: Any) -> Any:
        with ExitStack() as stack:
            for module, calls in zip(self.frozen, features, strict=True):
                stack.enter_context(_replaying(module, calls))
            return self.model(**batch.inputs)


@contextmanager
def _replaying(module: torch.nn.Module, outputs: Sequence[Any]) -> Iterator[None]:
    """While open, the first calls of ``module`` return ``outputs``, one after the other; further ones are its own."""
    own, left = module.forward, list(outputs)
    module.forward = lambda *args, **kwargs: left.pop(0) if left else own(*args, **kwargs)
    try:
        yield
    finally:
        del module.forward


def _replay_of(model: Any, new_parameters: Sequence[str]) -> Replay:
    if is_detector(model):
        return _DetectorReplay(model)
    if hasattr(model, "forward_features") and hasattr(model, "forward_head"):
        return _TimmReplay(model)
    base = getattr(model, "base_model_prefix", "")
    return Replay(model, new_parameters) if base and hasattr(model, base) else _RecordedReplay(model, new_parameters)


@contextmanager
def _returning(modules: Sequence[torch.nn.Module], output: Any) -> Iterator[None]:
    """While open, calling any of ``modules`` returns ``output``."""
    own = [vars(module).get("forward") for module in modules]  # accelerate's, where it has placed the model
    for module in modules:
        module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            del module.forward  # the class's own method is found again
            if forward is not None:
                module.forward = forward


class StreamedReplay(Replay):
    """As ``Replay``: what the frozen modules put out is computed by one sweep over the blocks for all batches."""

    def __init__(self, model: Any, new_parameters: Sequence[str], sweep: ForwardSweep) -> None:
        super().__init__(model, new_parameters)
        self.sweep = sweep
        self.shapes: dict[int, dict[str, Any]] = {}

    def features(self, batches: Sequence[Batch], progress: Progress) -> list[Any]:
        """What the frozen modules put out for every batch."""
        sweep = self.sweep
        steps = (sweep.n_blocks + 2) * len(batches)
        found: list[Any] = []
        with progress.stage("Fitting the task head", total=steps) as advance:
            sweep.run_front(lambda batch: None, advance)
            sweep.run_forward(0, lambda done: None, advance)
            sweep.residency.only(sweep.tail_names())
            with torch.no_grad():
                for number, batch in enumerate(batches):
                    self.shapes[id(batch)] = sweep.outlines[number].shapes
                    hidden = sweep.boundaries.read(sweep.n_blocks, number)
                    with sweep.parts.tail_only(hidden, sweep.outlines[number].shapes):
                        features, output = self.run(batch)
                    refuse_non_finite_logits(output)
                    found.append(features)
                    advance(1)
        return found

    def output(self, batch: Batch, features: Any) -> Any:
        """The model's output for ``batch`` with these features in place of computing the frozen modules."""
        if len(self.frozen) == 1 and self.frozen[0] not in self._blocks():
            return super().output(batch, features)
        hidden = features[0] if isinstance(features, tuple) else features
        with self.sweep.parts.tail_only(hidden, self.shapes[id(batch)]):
            return self.model(**batch.inputs)

    def _blocks(self) -> list[torch.nn.Module]:
        return [self.model.get_submodule(path) for path in self.sweep.parts.blocks]


@contextmanager
def streamed_replay(
    model: torch.nn.Module,
    weights: Weights,
    new_parameters: Sequence[str],
    batches: Sequence[Batch],
    parent: Path | None,
    device: torch.device,
) -> Iterator[StreamedReplay]:
    """What ``fit_head`` needs of a model whose weights stay on disk; the activations lie below ``parent`` meanwhile.

    Args:
        model, weights: see ``measure_streamed``.
        new_parameters: of the head; they are in memory.
        batches: those that ``fit_head`` gets; it goes over them many times.
        parent: a directory; the system's own for temporary files where it is None.
        device: where the blocks run.
    """
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        directory = stack.enter_context(stream_directory(None, parent))
        stack.enter_context(without_cache(model))
        sweep = ForwardSweep(model, weights, batches, directory, device)
        stack.callback(sweep.residency.close)
        yield StreamedReplay(model, new_parameters, sweep)


def head_state(model: torch.nn.Module, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The head's parameters, for keeping."""
    return {name: model.get_parameter(name).detach().cpu().clone() for name in names}


def head_arrays(
    model: torch.nn.Module, modules: Sequence[str], weights: Weights | None = None
) -> dict[str, np.ndarray]:
    """Everything in the modules of a head, as statistics keep it: float32 (float64 where the model has it) or int64.

    Args:
        model: its head is fitted.
        modules: paths of the head's modules.
        weights: where weights are that are not in memory.
    """
    inside = tuple(f"{module}." for module in modules)
    found = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(inside):
            continue
        if tensor.is_meta and weights is not None:
            tensor = torch.empty_like(tensor, device="cpu")
            weights.read(name, tensor)
        array = tensor.detach().cpu()
        if array.dtype != torch.float64:
            array = array.float() if array.is_floating_point() else array.long()
        found[name] = array.numpy().copy()
    return found


def put_head(model: torch.nn.Module, kept: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Put kept parameters of the head into the model; False where they are those of another head."""
    own = {name: model.get_parameter(name) for name in names}
    if any(name not in kept or tuple(kept[name].shape) != tuple(own[name].shape) for name in names):
        return False
    with torch.no_grad():
        for name in names:
            own[name].copy_(torch.as_tensor(kept[name]))
    return True
