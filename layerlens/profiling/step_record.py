"""Records a training step of a frozen model: every operation, what its backward pass needs, and for which layers' sake.

a) The forward pass runs once on tensors without data, and nothing requires a gradient. Every operation is noted with
   the storages that it reads and writes; hooks note which storages go into the layers and come out of them.
b) Every operation that a gradient can go through is run once more by itself, with gradients, on made-up inputs of the
   same shapes. Autograd itself then says which tensors it keeps, for which input's sake, and what its backward pass
   runs. Operations that are alike (all blocks have the same) are asked about once.
c) What is alive at each of these operations, forwards and backwards, follows (``step_timeline``).
d) The causes follow from the graph of storages: the output of a layer has a gradient once the layer is adapted, and
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

from layerlens.integrations.attention import attention_outputs
from layerlens.integrations.operations import buffers_standing_still, weights_without_data
from layerlens.integrations.transformers import blocks_to_checkpoint, full_batches
from layerlens.models import ModelSpec
from layerlens.models.model_spec import ATTENTION, LayerSpec
from layerlens.models.step import KINDS, MEMORY, StepRecord, TracedOperation
from layerlens.profiling.step_blocks import BlockCall, block_arrays, watched_blocks
from layerlens.profiling.step_calls import (
    Autograd,
    DescribedTensor,
    ForwardRecorder,
    LayerEvent,
    RecordedCall,
)
from layerlens.profiling.step_timeline import BackwardStep, backward_timeline, forward_timeline, last_readers

INPUT, OUTPUT, QUERY, RESULT = 0, 1, 2, 3
Step = Callable[[int], "torch.Tensor"]
"""Number of samples -> the loss of a batch of so many, computed by the model."""


@dataclass
class _Graph:
    """What the recorded operations need in the backward pass; ``spread`` fills it in."""

    forward: ForwardRecorder
    events: Sequence[LayerEvent]
    opens: Mapping[tuple[int, int], Sequence[int]]
    head: Mapping[int, int]
    blocks: Sequence[BlockCall] = ()
    n_layers: int = 0
    cause: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    kept: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    own_bytes: list[tuple[int, int, int]] = field(default_factory=list)
    backward: list[tuple[TracedOperation, int]] = field(default_factory=list)
    steps: list[BackwardStep] = field(default_factory=list)

    def spread(self, asked: Autograd) -> None:
        """Go through the operations in their order; causes go from inputs to results."""
        cause, uses = self.cause, defaultdict[int, int](int)
        cause.update(self.head)
        waiting = sorted(self.events, key=lambda event: event.at)
        for at, call in enumerate([*self.forward.calls, None]):
            while waiting and waiting[0].at <= at:
                event = waiting.pop(0)
                for layer in self.opens.get((event.layer, event.side), ()):
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
        # Where nothing is kept or multiplied (a stack of a thousand frames), it does not matter for whose sake.
        alike = not whole.kept and not any(operation.flops for operation in whole.operations)
        single = {} if alike or len(active) == 1 else {place: asked(call, (place,)) for place in whole.gradients}
        kept_here = []
        for name, place in whole.kept:
            for_sake = 0
            for one, alone in single.items():
                if (name, place) in alone.kept:
                    for_sake |= of[one]
            for_sake = for_sake or together
            if name == "own":
                self.own_bytes.append((place, for_sake, at))
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
        self.steps.append(BackwardStep(call, active, whole, tuple(kept_here), at, together))
        for place in whole.needs_grad:
            cause[call.results[place].storage] |= together


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
    head = _weights_of(model, heads)
    joined = _joined(recorded)
    if joined is None:  # the passes differ: the last alone, in proportion
        recorded, batch_sizes = recorded[-1:], batch_sizes[-1:]
        joined = _joined(recorded)
        assert joined is not None
    return StepRecord(
        layers=tuple(layer.name for layer in spec.layers),
        batch_sizes=tuple(batch_sizes),
        sequence_length=sequence_length,
        blocks=tuple(blocks_to_checkpoint(model)),
        head_tensors=len(head),
        head_elements=sum(weight.numel() for weight in head),
        uncounted=_uncounted(recorded),
        **joined,
    )


def _uncounted(recorded: Sequence[_Graph]) -> dict[str, str]:
    """Operations of any recording whose own memory is not counted, with the reason."""
    found: dict[str, str] = {}
    for graph in recorded:
        for uncounted in (graph.forward.uncounted, *(step.backward.uncounted for step in graph.steps)):
            found = uncounted | found
    return found


def _weights_of(model: torch.nn.Module, modules: Sequence[str]) -> list[torch.Tensor]:
    return [weight for name in modules for weight in model.get_submodule(name).parameters()]


def _recorded(
    model: torch.nn.Module, spec: ModelSpec, step: Step, heads: Sequence[str], samples: int, asked: Autograd
) -> _Graph:
    events: list[LayerEvent] = []
    calls: list[BlockCall] = []
    blocks = blocks_to_checkpoint(model)
    active = detect_fake_mode()  # of a model whose weights have no data
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with (
        weights_without_data(model, mode) if active is None else nullcontext(),
        mode if active is None else nullcontext(),
        torch.random.fork_rng(devices=[]),
        buffers_standing_still(model),
        full_batches(),
    ):
        forward = ForwardRecorder([*model.parameters(), *model.buffers()])
        trains = 1 << len(spec.layers)
        always = {forward.number(weight): trains for weight in _weights_of(model, heads)}
        with (
            _watched(model, spec.layers, forward, events),
            _queries(model, spec.layers, forward, events),
            watched_blocks(blocks, forward, calls),
            _recurrent_calls(model, forward),
            forward,
        ):
            loss = step(samples)
            del loss
    graph = _Graph(forward, events, _openings(spec.layers), always, calls, len(spec.layers))
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


@contextmanager
def _recurrent_calls(model: torch.nn.Module, forward: ForwardRecorder) -> Iterator[None]:
    """Tell the recorder when a recurrent layer runs."""

    def before(*_: Any) -> None:
        forward.in_recurrent = True

    def after(*_: Any) -> None:
        forward.in_recurrent = False

    layers = [module for module in model.modules() if isinstance(module, torch.nn.RNNBase)]
    handles = [layer.register_forward_pre_hook(before) for layer in layers]
    handles += [layer.register_forward_hook(after) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _queries(
    model: torch.nn.Module, layers: Sequence[LayerSpec], forward: ForwardRecorder, events: list[LayerEvent]
) -> Iterator[None]:
    """Note the queries of attention blocks that take a prefix, where a product with them takes them as they lie.

    Elsewhere (after rotary embeddings) it copies them.
    """
    blocks = {
        id(model.get_submodule(layer.module)): number
        for number, layer in enumerate(layers)
        if layer.layer_type == ATTENTION
    }

    def note(module: torch.nn.Module, query: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        number = blocks.get(id(module))
        rows = query.transpose(0, 1)
        try:
            rows.view(rows.shape[0], -1, rows.shape[-1])
        except (RuntimeError, ValueError):  # ValueError: of tensors without data
            return output
        if number is not None:
            events.append(LayerEvent(len(forward.calls), number, QUERY, forward.number(query), query.element_size()))
        return output

    with attention_outputs(model, note) if blocks else nullcontext():
        yield


def _openings(layers: Sequence[LayerSpec]) -> dict[tuple[int, int], list[int]]:
    """(layer, side) of an event -> layers by whose options the storage gets a gradient.

    A layer's options change its output. A prefix changes what its block's attention gives to the output projection.
    """
    opens: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, layer in enumerate(layers):
        if layer.layer_type != ATTENTION:
            opens[number, OUTPUT].append(number)
            continue
        after = [
            other
            for other, one in enumerate(layers)
            if one.role == "attention_output" and one.block == layer.block and other > number - len(layers)
        ]
        inside = [other for other in after if layers[other].name.startswith(f"{layer.name}.")]
        place = next(iter(inside or after), None)
        opens[number if place is None else place, INPUT].append(number)
    return opens


def _joined(recorded: Sequence[_Graph]) -> dict[str, Any] | None:
    """The arrays of a record; None where the recordings are not of the same operations."""
    parts = [_arrays(graph) for graph in recorded]
    for name in (
        "forward_kind",
        "backward_kind",
        "backward_cause",
        "storage_cause",
        "read__ns",
        "step_cause",
        "block_span__gt",
        "block_input__ns",
        "causes",
    ):
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
    read += [
        (opened, RESULT, event.storage)
        for event in graph.events
        for opened in graph.opens.get((event.layer, event.side), ())
    ]
    wanted = sorted(
        {storage for storage, cause in graph.kept.items() if cause}
        | {storage for *_, storage in read}
        | {storage for call in graph.blocks for storage in call.given}
    )
    number = {storage: position for position, storage in enumerate(wanted)}
    storage_cause = [place(graph.kept[storage]) if graph.kept.get(storage) else -1 for storage in wanted]
    storage_bytes = [0 if storage in forward.fixed else forward.n_bytes[storage] for storage in wanted]
    n_calls = len(forward.calls)
    released = last_readers(graph.steps)
    spans = [
        (forward.born[storage], forward.died.get(storage, n_calls), released.get(storage, n_calls))
        for storage in wanted
    ]
    for n_bytes, cause, at in graph.own_bytes:
        storage_cause.append(place(cause))
        storage_bytes.append(n_bytes)
        spans.append((at, at, at))
    n_layers = graph.n_layers
    element_bytes = np.zeros((n_layers, 3), dtype=np.int32)
    layer_span = np.tile(np.array([n_calls, 0], dtype=np.int32), (n_layers, 1))
    for event in graph.events:
        element_bytes[event.layer, event.side] = event.element_bytes
        span = layer_span[event.layer]
        span[:] = min(span[0], event.at), max(span[1], event.at)
    held, passing, step_cause = backward_timeline(graph.steps, n_calls)
    return {
        "n_layers": n_layers,
        "step_cause": np.array([place(cause) if cause else -1 for cause in step_cause], dtype=np.int32),
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
        "storage_span__st": np.array(spans, dtype=np.int32).reshape(-1, 3),
        "layer_span__lt": layer_span,
        "forward_peak__b": np.float64(forward.peak),
        "alive__bf": forward_timeline(forward),
        "held__bf": held,
        "passing__bf": passing,
        **block_arrays(graph.blocks, forward, graph.steps, number),
    }


def _kinds(operations: Iterator[TracedOperation] | Any) -> np.ndarray:
    return np.array([KINDS.index(operation.kind) for operation in operations], dtype=np.int8)


def _figures(operations: Iterator[TracedOperation] | Any) -> np.ndarray:
    rows = [(operation.flops, operation.n_bytes, operation.fresh_bytes) for operation in operations]
    return np.array(rows, dtype=np.float64).reshape(-1, 3)
