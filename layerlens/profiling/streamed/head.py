"""Fitting a new task head on the features of a model whose weights stay on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from layerlens.integrations.transformers import without_cache
from layerlens.profiling.head import Replay, refuse_non_finite_logits
from layerlens.profiling.streamed.journal import stream_directory
from layerlens.profiling.streamed.residency import Weights
from layerlens.profiling.streamed.sweep import ForwardSweep
from layerlens.tasks import Batch
from layerlens.utils.progress import Progress


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


def put_head(model: torch.nn.Module, kept: dict[str, torch.Tensor], names: Sequence[str]) -> bool:
    """Put kept parameters of the head into the model; False where they are those of another head."""
    own = {name: model.get_parameter(name) for name in names}
    if kept.keys() != own.keys() or any(kept[name].shape != own[name].shape for name in names):
        return False
    with torch.no_grad():
        for name in names:
            own[name].copy_(kept[name])
    return True
