"""Records a training step of a frozen model: every operation, what its backward pass needs, and for which layers' sake.

a) The forward pass runs once on tensors without data, and nothing requires a gradient. Every operation is noted with
   the storages that it reads and writes; hooks note which storages go into the layers and come out of them.
b) Every operation that a gradient can go through is run once more by itself, with gradients, on made-up inputs of the
   same shapes. Autograd itself then says which tensors it keeps, for which input's sake, and what its backward pass
   runs. Operations that are alike (all blocks have the same) are asked about once.
c) The causes follow from the graph of storages: the output of a layer has a gradient once the layer is adapted, and
   what is computed from it has one too. No name of a module matters.

The result is ``models.step.StepRecord``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from layerlens.integrations.operations import buffers_standing_still
from layerlens.models import ModelSpec
from layerlens.models.model_spec import ATTENTION, LayerSpec
from layerlens.models.step import KINDS, MEMORY, StepRecord, TracedOperation
from layerlens.profiling.step_calls import (
    Autograd,
    BackwardOf,
    DescribedTensor,
    ForwardRecorder,
    LayerEvent,
    RecordedCall,
)

INPUT, OUTPUT = 0, 1
Step = Callable[[int], "torch.Tensor"]
"""Number of samples -> the loss of a batch of so many, computed by the model."""


@dataclass
class _Graph:
    """What the recorded operations need in the backward pass; ``spread`` fills it in."""

    forward: ForwardRecorder
    events: Sequence[LayerEvent]
    opens: Mapping[int, Sequence[int]]
    head: Mapping[int, int]
    n_layers: int = 0
    cause: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    kept: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    own_bytes: list[tuple[int, int]] = field(default_factory=list)
    backward: list[tuple[TracedOperation, int]] = field(default_factory=list)
    steps: list[tuple[RecordedCall, tuple[int, ...], BackwardOf, list[int], int]] = field(default_factory=list)

    def spread(self, asked: Autograd) -> None:
        """Go through the operations in their order; causes go from inputs to results."""
        cause, uses = self.cause, defaultdict[int, int](int)
        cause.update(self.head)
        waiting = sorted(self.events, key=lambda event: event.at)
        for at, call in enumerate([*self.forward.calls, None]):
            while waiting and waiting[0].at <= at:
                event = waiting.pop(0)
                for layer in self.opens.get(2 * event.layer + event.side, ()):
                    cause[event.storage] |= 1 << layer
            if call is None:
                break
            active = tuple(
                place
                for place, leaf in enumerate(call.leaves)
                if isinstance(leaf, DescribedTensor) and leaf.differentiable and cause.get(leaf.storage)
            )
            if active:
                self._add(call, active, asked, uses, at)

    def _add(self, call: RecordedCall, active: tuple[int, ...], asked: Autograd, uses: dict[int, int], at: int) -> None:
        cause, whole = self.cause, asked(call, active)
        if not whole.needs_grad:
            return
        of = {place: cause[call.leaves[place].storage] for place in active}
        together = 0
        for place in whole.gradients:
            together |= of[place]
        single = {place: asked(call, (place,)) for place in whole.gradients} if len(active) > 1 else {}
        kept_here = []
        for name, place in whole.kept:
            for_sake = 0
            for one, alone in single.items():
                if (name, place) in alone.kept:
                    for_sake |= of[one]
            for_sake = for_sake or together
            if name == "own":
                self.own_bytes.append((place, for_sake))
                continue
            kept_tensor = call.leaves[place] if name == "leaf" else call.results[place]
            if kept_tensor.storage not in self.forward.fixed:
                self.kept[kept_tensor.storage] |= for_sake
                kept_here.append(kept_tensor.storage)
        apart = sum(x.flops for one in single.values() for x in one.operations)
        if single and apart and apart == sum(x.flops for x in whole.operations):
            for place, alone in single.items():
                self.backward += [(operation, of[place]) for operation in alone.operations]
        else:
            self.backward += [(operation, together) for operation in whole.operations]
        for place in whole.gradients:
            leaf = call.leaves[place]
            if uses[leaf.serial]:  # gradients of one tensor from several operations are added up
                self.backward.append((TracedOperation(MEMORY, 0.0, 3.0 * leaf.n_bytes), of[place]))
            uses[leaf.serial] += 1
        self.steps.append((call, active, whole, kept_here, at))
        for place in whole.needs_grad:
            cause[call.results[place].storage] |= together

    def workspace(self) -> int:
        """Most bytes alive beside what is kept, less what is kept that has been let go by then (or comes later)."""
        return max(self._forward_workspace(), self._backward_workspace(), 0)

    def _forward_workspace(self) -> int:
        forward = self.forward
        change = np.zeros(len(forward.calls) + 2, dtype=np.int64)
        kept_later = np.zeros(len(forward.calls) + 2, dtype=np.int64)
        for number, n_bytes in enumerate(forward.n_bytes):
            if number in forward.fixed:
                continue
            if self.kept.get(number):
                kept_later[: forward.born[number]] += n_bytes
            else:
                change[forward.born[number]] += n_bytes
                change[forward.died.get(number, len(forward.calls)) + 1] -= n_bytes
        for n_bytes, _ in self.own_bytes:
            kept_later[:0] += n_bytes
        return int((np.cumsum(change) - kept_later).max(initial=0))

    def _backward_workspace(self) -> int:
        savers: dict[int, int] = defaultdict(int)
        for *_, kept, _at in self.steps:
            for storage in kept:
                savers[storage] += 1
        most = released = 0
        buffers: dict[int, int] = {}  # number of a gradient's memory -> bytes
        gradient: dict[int, int] = {}  # storage -> number of its gradient's memory
        users: dict[int, int] = defaultdict(int)
        fresh = 0
        for call, active, backward, kept, _at in reversed(self.steps):
            results = {call.results[place].storage for place in backward.needs_grad}
            for storage in results:
                if storage not in gradient:  # of the loss
                    fresh += 1
                    gradient[storage], buffers[fresh] = fresh, 0
                    users[fresh] += 1
            most = max(most, sum(buffers.values()) + backward.peak - released)
            inputs = {call.leaves[place].storage for place in active}
            arriving = next(iter(results))
            for place, size in backward.gradients.items():
                storage = call.leaves[place].storage
                if storage in results:
                    continue
                held = gradient.get(storage)
                if held is not None:
                    if users[held] == 1 or size is None:
                        continue  # added to what is there
                    users[held] -= 1
                if size is None:
                    gradient[storage] = gradient[arriving]
                else:
                    fresh += 1
                    gradient[storage], buffers[fresh] = fresh, size
                users[gradient[storage]] += 1
            for storage in results - inputs:
                users[gradient.pop(storage)] -= 1
            for number in [number for number in buffers if users[number] <= 0]:
                del buffers[number]
            for storage in kept:
                savers[storage] -= 1
                if not savers[storage]:
                    released += self.forward.n_bytes[storage]
        return most


def record_step(
    model: torch.nn.Module,
    spec: ModelSpec,
    step: Step,
    *,
    heads: Sequence[str] = (),
    batch_sizes: Sequence[int] = (2, 4),
    sequence_length: int = 0,
) -> StepRecord:
    """Record ``step`` for batches of ``batch_sizes``; nothing of the model changes.

    Args:
        model: frozen, in the mode that it is trained in.
        spec: its layers.
        step: called inside ``FakeTensorMode``: it makes a batch, and nothing of it lives on when it returns the loss.
        heads: modules that train whatever is chosen.
        batch_sizes: of the recordings; figures of others lie on the line through them.
        sequence_length: tokens of the samples; 0 where they are no tokens.

    Raises:
        RuntimeError, NotImplementedError: the model needs to look at numbers, or autograd cannot be asked.
    """
    asked = Autograd()
    recorded = [_recorded(model, spec, step, heads, samples, asked) for samples in batch_sizes]
    head = [weight for name in heads for weight in model.get_submodule(name).parameters()]
    joined = _joined(recorded)
    if joined is None:  # the passes differ: the last alone, in proportion
        recorded, batch_sizes = recorded[-1:], batch_sizes[-1:]
        joined = _joined(recorded)
        assert joined is not None
    return StepRecord(
        layers=tuple(layer.name for layer in spec.layers),
        batch_sizes=tuple(batch_sizes),
        sequence_length=sequence_length,
        head_tensors=len(head),
        head_elements=sum(weight.numel() for weight in head),
        **joined,
    )


def _recorded(
    model: torch.nn.Module, spec: ModelSpec, step: Step, heads: Sequence[str], samples: int, asked: Autograd
) -> _Graph:
    head = [weight for name in heads for weight in model.get_submodule(name).parameters()]
    events: list[LayerEvent] = []
    active = detect_fake_mode()  # of a model whose weights have no data
    with (
        FakeTensorMode(allow_non_fake_inputs=True) if active is None else nullcontext(),
        torch.random.fork_rng(devices=[]),
        buffers_standing_still(model),
    ):
        forward = ForwardRecorder([*model.parameters(), *model.buffers()])
        trains = 1 << len(spec.layers)
        always = {forward.number(weight): trains for weight in head}
        with _watched(model, spec.layers, forward, events), forward:
            loss = step(samples)
            del loss
    graph = _Graph(forward, events, _openings(spec.layers), always, len(spec.layers))
    graph.spread(asked)
    return graph


@contextmanager
def _watched(
    model: torch.nn.Module, layers: Sequence[LayerSpec], forward: ForwardRecorder, events: list[LayerEvent]
) -> Iterator[None]:
    def note(layer: int, side: int, tensors: Any) -> None:
        found = next((x for x in tree_leaves(tensors) if isinstance(x, torch.Tensor) and x.is_floating_point()), None)
        if found is not None:
            events.append(LayerEvent(len(forward.calls), layer, side, forward.number(found), found.element_size()))

    handles = []
    for number, layer in enumerate(layers):
        module = model.get_submodule(layer.module)

        def before(_: Any, args: Any, kwargs: Any, number: int = number) -> None:
            note(number, INPUT, (args, kwargs))

        def after(_: Any, __: Any, out: Any, number: int = number) -> None:
            note(number, OUTPUT, out)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _openings(layers: Sequence[LayerSpec]) -> dict[int, list[int]]:
    """2 · layer + side of an event -> layers by whose options the storage gets a gradient.

    A layer's options change its output. A prefix changes what its block's attention gives to the output projection.
    """
    opens: dict[int, list[int]] = defaultdict(list)
    for number, layer in enumerate(layers):
        if layer.layer_type != ATTENTION:
            opens[2 * number + OUTPUT].append(number)
            continue
        after = [
            other
            for other, one in enumerate(layers)
            if one.role == "attention_output" and one.block == layer.block and other > number - len(layers)
        ]
        inside = [other for other in after if layers[other].name.startswith(f"{layer.name}.")]
        place = next(iter(inside or after), None)
        opens[2 * number + INPUT if place is None else 2 * place + INPUT].append(number)
    return opens


def _joined(recorded: Sequence[_Graph]) -> dict[str, Any] | None:
    """The arrays of a record; None where the recordings are not of the same operations."""
    parts = [_arrays(graph) for graph in recorded]
    for name in ("forward_kind", "backward_kind", "backward_cause", "storage_cause", "read__ns", "causes"):
        if any(not np.array_equal(part[name], parts[0][name]) for part in parts[1:]):
            return None
    stacked = {name: np.stack([part[name] for part in parts]) for name in parts[0] if "__b" in name}
    first = parts[0]
    n_layers = first.pop("n_layers")
    causes = first.pop("causes")
    bits = np.array([[bool(int(cause, 16) >> bit & 1) for bit in range(n_layers + 1)] for cause in causes], dtype=bool)
    rest = {name: value for name, value in first.items() if "__b" not in name}
    return {**rest, **stacked, "cause__cl": bits.reshape(len(causes), n_layers + 1)}


def _arrays(graph: _Graph) -> dict[str, Any]:
    forward = graph.forward
    causes: dict[int, int] = {}

    def place(cause: int) -> int:
        return causes.setdefault(cause, len(causes))

    backward = [(operation, place(cause)) for operation, cause in graph.backward if cause]
    read = [(event.layer, event.side, event.storage) for event in graph.events]
    wanted = sorted({storage for storage, cause in graph.kept.items() if cause} | {storage for *_, storage in read})
    number = {storage: position for position, storage in enumerate(wanted)}
    storage_cause = [place(graph.kept[storage]) if graph.kept.get(storage) else -1 for storage in wanted]
    storage_bytes = [0 if storage in forward.fixed else forward.n_bytes[storage] for storage in wanted]
    for n_bytes, cause in graph.own_bytes:
        storage_cause.append(place(cause))
        storage_bytes.append(n_bytes)
    n_layers = graph.n_layers
    element_bytes = np.zeros((n_layers, 2), dtype=np.int32)
    for event in graph.events:
        element_bytes[event.layer, event.side] = event.element_bytes
    return {
        "n_layers": n_layers,
        "causes": np.array([f"{cause:x}" for cause in causes], dtype=object),
        "forward_kind": _kinds(call.traced for call in forward.calls),
        "forward__bfx": _figures(call.traced for call in forward.calls),
        "backward_kind": _kinds(operation for operation, _ in backward),
        "backward_cause": np.array([cause for _, cause in backward], dtype=np.int32),
        "backward__bkx": _figures(operation for operation, _ in backward),
        "storage_cause": np.array(storage_cause, dtype=np.int32),
        "storage__bs": np.array(storage_bytes, dtype=np.float64),
        "read__ns": np.array(
            sorted({(layer, side, number[storage]) for layer, side, storage in read}), dtype=np.int32
        ).reshape(-1, 3),
        "element_bytes": element_bytes,
        "forward_peak__b": np.float64(forward.peak),
        "workspace__b": np.float64(graph.workspace()),
    }


def _kinds(operations: Iterator[TracedOperation] | Any) -> np.ndarray:
    return np.array([KINDS.index(operation.kind) for operation in operations], dtype=np.int8)


def _figures(operations: Iterator[TracedOperation] | Any) -> np.ndarray:
    rows = [(operation.flops, operation.n_bytes, operation.fresh_bytes) for operation in operations]
    return np.array(rows, dtype=np.float64).reshape(-1, 3)
