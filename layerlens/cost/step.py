"""What a training step costs for any choice of options, from one recorded step of the frozen model.

A cost is paid for by every choice (the base), by one option, or by every choice that has at least one of several
options: the *cause* of what is kept or computed. So for any choice

    cost = base + Σ options + Σ causes that have one of its options

What depth is: the cause of what lies above a block is every layer up to it, so the causes of a chain of blocks are
nested, and the deepest one that is paid pays for all above it. What shared inputs are: q, k and v keep one tensor,
whose cause is the LoRA options of the three.

That is ``StepUse``, the prediction for a given choice; its peak memory is that of a timeline.

The solver wants sums, and causes that are nested or apart. Where two cross (only the gate, or only the up projection of
one block is adapted), one is widened to both (:mod:`layerlens.cost.causes`). In place of the timeline it has all that
is kept, and the most that any of many choices has alive beside that. So the solver's memory and time are upper bounds;
:mod:`layerlens.cost.floor` has lower ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from layerlens.cost.causes import Paid
from layerlens.cost.checkpoints import checkpoints
from layerlens.methods import Method, Operation
from layerlens.methods.method import INPUT, OUTPUT, QUERY
from layerlens.models import NONE, DepthCharge, GroupCharge, LayerSpec, ModelSpec, Option
from layerlens.models.model_spec import ATTENTION
from layerlens.models.step import KINDS, MATMUL, MEMORY, REUSED_BYTES, VIEW, StepRecord, TracedOperation
from layerlens.models.step_use import RANDOM_STATE_BYTES, StepUse
from layerlens.registry import METHODS

FLOAT_BYTES = 4
SIDES = {INPUT: 0, OUTPUT: 1, QUERY: 2}
RESULT = 3
LOSS_BYTES = 1024
"""The loss, what its operation counts, and what trainers count beside it: a few numbers."""

OperationTime = Callable[[TracedOperation], float]
"""Milliseconds of one operation."""


@dataclass(frozen=True)
class StepCosts:
    """Memory and time of a training step.

    Args:
        base_ms: ms of every choice that adapts something.
        own__xo: float64 [2, options], (GB, ms) of each option by itself.
        charges: what is paid once; ``cost__r`` is (GB, ms).
        depth: what the lowest adapted layer costs; None where the layers form no chain.
        least_gb: what a step needs at least, whatever is adapted: a forward pass of the frozen model, and what an
            option has alive for a moment in it; and for each trainable parameter.
        use: what a given choice needs and takes, which the sums are bounds of.
    """

    base_ms: float
    own__xo: np.ndarray
    charges: tuple[GroupCharge, ...]
    depth: DepthCharge | None
    least_gb: tuple[float, float]
    use: StepUse


def step_costs(
    spec: ModelSpec,
    record: StepRecord,
    options: Sequence[Option],
    time_ms: OperationTime,
    parameter_ms: float,
    *,
    samples: int,
    sequence_length: int,
    state_values: int,
    accumulates: bool = False,
    checkpointed: Collection[str] = (),
) -> StepCosts:
    """Costs of a training step with a batch of ``samples``.

    Args:
        spec: the model.
        record: its recorded step.
        options: what may be chosen.
        time_ms: of one operation on the device.
        parameter_ms: of the optimiser for each tensor, beside its elements.
        samples: in the batch.
        sequence_length: tokens of each; not read where the model takes no tokens. Another one than was recorded counts
            in proportion.
        state_values: of the optimiser, for each parameter.
        accumulates: gradients of several batches are added up.
        checkpointed: names of the blocks whose activations are computed again in the backward pass.
    """
    scale = float(samples)
    if record.sequence_length:
        scale = samples * sequence_length / record.sequence_length
    place = {name: number for number, name in enumerate(record.layers)}
    layer__o = np.array([-1 if o.method == NONE else place.get(o.layer, -1) for o in options], dtype=np.int64)
    paid = Paid(options, [layer.name for layer in spec.layers], layer__o, len(record.layers), 2)
    layer_of = {layer.name: layer for layer in spec.layers}
    own = [
        _own(layer_of[o.layer], o, record, time_ms, parameter_ms, samples, sequence_length, state_values)
        for o, _ in paid.entries
    ]
    parts__xo = np.zeros((_PARTS, len(options)))
    parts__xo[:, [entry for _, entry in paid.entries]] = np.array(own).reshape(-1, _PARTS).T
    fixed, gradient, kept, ms, forward_ms = parts__xo[:5]
    everywhere = np.array([0, len(record.forward_kind)], dtype=np.int64)
    span__ot = np.where((layer__o >= 0)[:, None], record.layer_span__lt[layer__o], everywhere)
    forward = _operations(record.forward_kind, record.at("forward__bfx", scale))
    forward_ms__f = np.array([time_ms(operation) for operation in forward])
    base_ms = float(forward_ms__f.sum())
    backward = _operations(record.backward_kind, record.at("backward__bkx", scale))
    cause_ms = np.zeros(len(record.cause__cl))
    for operation, cause in zip(backward, record.backward_cause, strict=True):
        cause_ms[cause] += time_ms(operation)
    for cause, layers in enumerate(record.cause__cl):
        paid.add(paid.of(layers), np.array([0.0, cause_ms[cause]]))
    found = checkpoints(record, checkpointed, layer__o, span__ot, forward_ms__f, forward_ms, scale)
    hidden__s, hidden__o = np.zeros(len(record.storage_cause), dtype=bool), np.zeros(len(options), dtype=bool)
    given: dict[int, np.ndarray] = {}
    if found is not None:
        hidden__s, hidden__o = found.call__s >= 0, found.call__o >= 0
        ms = ms + found.again_ms__o
        for layers, again_ms in zip(found.layers__gl, found.again_ms__g, strict=True):
            paid.add(paid.of(layers), np.array([2e-9 * RANDOM_STATE_BYTES, again_ms]))
        for call, storage in found.given__ns.tolist():
            given[storage] = given.get(storage, False) | found.layers__gl[call]
    paid.own[:] = 1e-9 * (fixed + gradient + kept * ~hidden__o), ms
    readers, changed = _readers(spec, record, options)
    none = np.zeros(len(record.layers) + 1, dtype=bool)
    storage_bytes = record.at("storage__bs", scale)
    kept_by = defaultdict[int, list[int]](list)
    for storage, n_bytes in enumerate(storage_bytes):
        cause = record.storage_cause[storage]
        layers = (record.cause__cl[cause] if cause >= 0 else none) | given.get(storage, none)
        if not hidden__s[storage]:
            options_of = paid.of(layers)
            for entry in readers.get(storage, ()):
                options_of |= 1 << entry
            paid.add(options_of, np.array([1e-9 * n_bytes, 0.0]))
        for entry in readers.get(storage, ()):
            kept_by[entry].append(storage)
    head = record.head_elements
    base_ms += time_ms(_update(head, state_values)) + parameter_ms * record.head_tensors
    value_bytes = record.value_bytes
    weights = spec.weight_bytes + value_bytes * (1 + state_values) * head + LOSS_BYTES  # PEFT trains a copy of the head
    use = StepUse(
        base_bytes=float(weights),
        base_ms=float(base_ms),
        cause__cl=record.cause__cl,
        cause_ms=cause_ms,
        storage_bytes=storage_bytes,
        storage_cause=record.storage_cause,
        storage_span__st=record.storage_span__st,
        alive=record.at("alive__bf", scale),
        held=record.at("held__bf", scale),
        passing=record.at("passing__bf", scale),
        step_cause=record.step_cause,
        layer__o=layer__o,
        span__ot=span__ot,
        fixed__o=fixed,
        gradient__o=gradient,
        kept__o=kept,
        passing__ox=np.ascontiguousarray(parts__xo[5:].T),
        ms__o=parts__xo[3],
        readers={entry: np.array(storages) for entry, storages in kept_by.items()},
        changed=changed,
        accumulates=accumulates,
        checkpoints=found,
    )
    per_parameter = value_bytes * (1 + state_values)  # itself and its state; the gradients come after the peak
    forward_peak = float(record.at("forward_peak__b", scale)) + use.passing__ox[:, 0].max(initial=0.0)
    least_gb = 1e-9 * (weights + forward_peak), 1e-9 * per_parameter
    charges, depth = paid.charges()
    return StepCosts(float(base_ms + paid.base[1]), paid.own, charges, depth, least_gb, use)


def typical(options: Sequence[Option], names: Sequence[str]) -> Iterator[np.ndarray]:
    """Choices whose memory stands for that of all: each method on one layer, each on all layers from
    every layer up (from 64 of them, where there are more), and as many mixed at random, the same ones every time.
    """
    by_method = defaultdict[str, dict[str, int]](dict)
    by_layer = defaultdict[str, list[int]](list)
    for entry, option in enumerate(options):
        if option.method != NONE:
            by_method[option.method][option.layer] = entry
            by_layer[option.layer].append(entry)
    for entries in by_method.values():
        upwards = np.array([entries[name] for name in names if name in entries])
        for start in np.unique(np.linspace(0, len(upwards) - 1, min(len(upwards), 64)).astype(int)):
            yield upwards[start:]
            yield upwards[start : start + 1]
    draw, layers = np.random.default_rng(0), [by_layer[name] for name in names if name in by_layer]
    for mixed in range(64 if layers else 0):
        share = (0.2, 0.5, 1.0)[mixed % 3]
        above = [entries for entries in layers[draw.integers(len(layers)) :] if draw.random() < share]
        if above:
            yield np.array([entries[draw.integers(len(entries))] for entries in above])


def _operations(kinds: np.ndarray, figures: np.ndarray) -> list[TracedOperation]:
    return [TracedOperation(KINDS[kind], *row) for kind, row in zip(kinds.tolist(), figures.tolist(), strict=True)]


def _update(elements: int, state_values: int) -> TracedOperation:
    """The optimiser's step: reads weight, gradient and state, and writes all but the gradient."""
    return TracedOperation(MEMORY, 0.0, float(FLOAT_BYTES * (3 + 2 * state_values) * elements))


_PARTS = 8
"""What an option has by itself: bytes of parameters and optimiser state, of gradients, of what it keeps; ms, and those
of its forward pass; and bytes alive for a moment, as in ``StepUse.passing__ox``."""


def _own(
    layer: LayerSpec,
    option: Option,
    record: StepRecord,
    time_ms: OperationTime,
    parameter_ms: float,
    samples: int,
    sequence_length: int,
    state_values: int,
) -> tuple[float, ...]:
    """The ``_PARTS`` of one option."""
    method = METHODS[option.method]
    params = method.trainable_params(layer, option.rank)
    tokens = samples * (layer.positions or sequence_length)
    elements = method.kept_elements(layer, option.rank) * tokens + method.kept_once(layer, option.rank)
    for side in _shared(method, layer, record):
        elements -= method.tensor_elements(layer, side) * tokens
    forward_ms = sum(time_ms(one) for step in method.operations(layer, option.rank) for one in _traced(step, tokens))
    time = forward_ms + sum(
        time_ms(one) for step in method.backward(layer, option.rank) for one in _traced(step, tokens)
    )
    time += method.views * time_ms(TracedOperation(VIEW, 0.0, 0.0))
    time += time_ms(_update(params, state_values)) + parameter_ms * method.parameter_tensors
    once, value_bytes = method.passing_once(layer, option.rank), record.value_bytes
    return (
        value_bytes * (1 + state_values) * params,
        value_bytes * params,
        value_bytes * max(0.0, elements),
        time,
        forward_ms,
        *(value_bytes * (per_token * tokens + once) for per_token in method.passing(layer, option.rank)),
    )


def _traced(step: Operation, tokens: int) -> list[TracedOperation]:
    """An operation as a trace has it: a product of matrices comes with its views."""
    n_bytes = FLOAT_BYTES * (step.elements * tokens + step.weights)
    flops = step.flops * tokens + step.call_flops
    written = FLOAT_BYTES * step.elements * tokens / 3.0
    fresh = written if written > REUSED_BYTES else 0.0
    operation = TracedOperation(MATMUL if flops else MEMORY, flops, n_bytes, fresh)
    return [operation] + ([TracedOperation(VIEW, 0.0, 0.0)] * 3 if flops else [])


def _shared(method: Method, layer: LayerSpec, record: StepRecord) -> list[str]:
    """The layer's tensors that the method keeps as they are: not where it needs them in another precision."""
    number = record.layers.index(layer.name) if layer.name in record.layers else -1
    return [
        side
        for side in method.kept_tensors(layer)
        if number >= 0 and record.element_bytes[number, SIDES[side]] == record.value_bytes
    ]


def _readers(
    spec: ModelSpec, record: StepRecord, options: Sequence[Option]
) -> tuple[dict[int, list[int]], dict[int, np.ndarray]]:
    """(storage -> the options that keep it; option -> the storages in whose place it puts others,
    where what made them, or the option itself, keeps them)."""
    storages = defaultdict[tuple[int, int], list[int]](list)
    for layer, side, storage in record.read__ns.tolist():
        storages[layer, side].append(storage)
    layers = {layer.name: layer for layer in spec.layers}
    place = {name: number for number, name in enumerate(record.layers)}
    found = defaultdict[int, list[int]](list)
    changed = {}
    for entry, option in enumerate(options):
        if option.method != NONE and option.layer in place:
            layer = layers[option.layer]
            for side in _shared(METHODS[option.method], layer, record):
                for storage in storages[place[option.layer], SIDES[side]]:
                    found[storage].append(entry)
            if layer.layer_type == ATTENTION or OUTPUT in METHODS[option.method].kept_tensors(layer):
                changed[entry] = np.array(storages[place[option.layer], RESULT], dtype=np.int64)
    return found, changed
