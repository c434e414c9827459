"""What a training step costs for any choice of options, from one recorded step of the frozen model.

A cost is paid for by every choice (the base), by one option, or by every choice that has at least one of several
options: the *cause* of what is kept or computed. So for any choice

    cost = base + Σ options + Σ causes that have one of its options

What depth is: the cause of what lies above a block is every layer up to it, so the causes of a chain of blocks are
nested, and the deepest one that is paid pays for all above it. What shared inputs are: q, k and v keep one tensor,
whose cause is the LoRA options of the three.

The solver wants causes that are nested or apart. Where two cross (only the gate, or only the up projection of one
block is adapted), one is widened to both: it is then paid too often, and only where a block is adapted in part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from layerlens.methods import Method, Operation
from layerlens.methods.method import INPUT, OUTPUT
from layerlens.models import NONE, DepthCharge, GroupCharge, LayerSpec, ModelSpec, Option
from layerlens.models.step import KINDS, MATMUL, MEMORY, REUSED_BYTES, VIEW, StepRecord, TracedOperation
from layerlens.registry import METHODS

FLOAT_BYTES = 4
SIDES = {INPUT: 0, OUTPUT: 1}

OperationTime = Callable[[TracedOperation], float]
"""Milliseconds of one operation."""


@dataclass(frozen=True)
class StepCosts:
    """Memory and time of a training step.

    Args:
        base: (GB, ms) of every choice that adapts something.
        own__xo: float64 [2, options], (GB, ms) of each option by itself.
        charges: what is paid once; ``cost__r`` is (GB, ms).
        depth: what the lowest adapted layer costs; None where the layers form no chain.
        least_gb: what a step needs at least, whatever is adapted: a forward pass of the frozen model; and for each
            trainable parameter.
    """

    base: tuple[float, float]
    own__xo: np.ndarray
    charges: tuple[GroupCharge, ...]
    depth: DepthCharge | None
    least_gb: tuple[float, float]


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
    """
    scale = float(samples)
    if record.sequence_length:
        scale = samples * sequence_length / record.sequence_length
    paid = _Paid(spec, record, options)
    for option, entry in paid.entries:
        paid.own[:, entry] = _own(
            paid.layers[option.layer], option, record, time_ms, parameter_ms, samples, sequence_length, state_values
        )
    forward = _operations(record.forward_kind, record.at("forward__bfx", scale))
    base_ms = sum(map(time_ms, forward))
    backward = _operations(record.backward_kind, record.at("backward__bkx", scale))
    cause_ms = np.zeros(len(record.cause__cl))
    for operation, cause in zip(backward, record.backward_cause, strict=True):
        cause_ms[cause] += time_ms(operation)
    for cause, layers in enumerate(record.cause__cl):
        paid.add(layers, (), 0.0, float(cause_ms[cause]))
    readers = _readers(spec, record, options)
    none = np.zeros(len(record.layers) + 1, dtype=bool)
    for storage, n_bytes in enumerate(record.at("storage__bs", scale)):
        cause = record.storage_cause[storage]
        layers = record.cause__cl[cause] if cause >= 0 else none
        paid.add(layers, readers.get(storage, ()), 1e-9 * float(n_bytes), 0.0)
    head = record.head_elements
    base_ms += time_ms(_update(head, state_values)) + parameter_ms * record.head_tensors
    weights = spec.weight_bytes + FLOAT_BYTES * (1 + state_values) * head
    passing = max(
        (_passing(paid.layers[name], samples, sequence_length) for name in {o.layer for o, _ in paid.entries}),
        default=0.0,
    )
    base_gb = 1e-9 * (weights + float(record.at("workspace__b", scale)) + passing)
    per_parameter = FLOAT_BYTES * (1 + state_values)  # itself and its state; the gradients come after the peak
    least_gb = 1e-9 * (weights + float(record.at("forward_peak__b", scale))), 1e-9 * per_parameter
    charges, depth = paid.charges()
    return StepCosts((float(base_gb + paid.base[0]), float(base_ms + paid.base[1])), paid.own, charges, depth, least_gb)


def _passing(layer: LayerSpec, samples: int, sequence_length: int) -> float:
    """Bytes that an option of the layer has alive for a moment, beside the workspace of the frozen model.

    In the backward pass of a feed-forward with inner width m and outer width d, the frozen model has at most 2 m alive
    for each token: the gradients on both sides of the activation function. LoRA on the second matrix has its gradient
    and the scaled one, 2 d, beside two gradients of its input, 2 m, until they are added up: 2 d more. On the first
    matrix it is d more. Attention of width d has room for as much below 2 m.
    """
    narrow = min(layer.inputs_per_position, layer.n_out)
    return FLOAT_BYTES * 2.0 * narrow * samples * (layer.positions or sequence_length)


def _operations(kinds: np.ndarray, figures: np.ndarray) -> list[TracedOperation]:
    return [TracedOperation(KINDS[kind], *row) for kind, row in zip(kinds.tolist(), figures.tolist(), strict=True)]


def _update(elements: int, state_values: int) -> TracedOperation:
    """The optimiser's step: reads weight, gradient and state, and writes all but the gradient."""
    return TracedOperation(MEMORY, 0.0, float(FLOAT_BYTES * (3 + 2 * state_values) * elements))


def _own(
    layer: LayerSpec,
    option: Option,
    record: StepRecord,
    time_ms: OperationTime,
    parameter_ms: float,
    samples: int,
    sequence_length: int,
    state_values: int,
) -> tuple[float, float]:
    """(GB, ms) of one option by itself: its parameters, what only it keeps, its operations, its optimiser step."""
    method = METHODS[option.method]
    params = method.trainable_params(layer, option.rank)
    tokens = samples * (layer.positions or sequence_length)
    elements = method.kept_elements(layer, option.rank) * tokens + method.kept_once(layer, option.rank)
    for side in _shared(method, layer, record):
        elements -= method.tensor_elements(layer, side) * tokens
    n_bytes = FLOAT_BYTES * ((2 + state_values) * params + max(0.0, elements))
    steps = [*method.operations(layer, option.rank), *method.backward(layer, option.rank)]
    time = sum(time_ms(one) for step in steps for one in _traced(step, tokens))
    time += method.views * time_ms(TracedOperation(VIEW, 0.0, 0.0))
    time += time_ms(_update(params, state_values)) + parameter_ms * method.parameter_tensors
    return 1e-9 * n_bytes, time


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
        if number >= 0 and record.element_bytes[number, SIDES[side]] == FLOAT_BYTES
    ]


def _readers(spec: ModelSpec, record: StepRecord, options: Sequence[Option]) -> dict[int, list[int]]:
    """Storage -> the options that keep it."""
    storages = defaultdict[tuple[int, int], list[int]](list)
    for layer, side, storage in record.read__ns.tolist():
        storages[layer, side].append(storage)
    layers = {layer.name: layer for layer in spec.layers}
    place = {name: number for number, name in enumerate(record.layers)}
    found = defaultdict[int, list[int]](list)
    for entry, option in enumerate(options):
        if option.method != NONE and option.layer in place:
            for side in _shared(METHODS[option.method], layers[option.layer], record):
                for storage in storages[place[option.layer], SIDES[side]]:
                    found[storage].append(entry)
    return found


class _Paid:
    """Adds up costs by what causes them."""

    def __init__(self, spec: ModelSpec, record: StepRecord, options: Sequence[Option]) -> None:
        self.options = options
        self.layers = {layer.name: layer for layer in spec.layers}
        self.names = [layer.name for layer in spec.layers]
        self.entries = [(option, entry) for entry, option in enumerate(options) if option.method != NONE]
        of_layer = defaultdict[str, int](int)
        for option, entry in self.entries:
            of_layer[option.layer] |= 1 << entry
        self.of_layer = [of_layer[name] for name in self.names]
        self.of_recorded = [of_layer[name] for name in record.layers]  # with layers that could not be measured
        self.own = np.zeros((2, len(options)))
        self.base = np.zeros(2)
        self.causes: dict[int, np.ndarray] = {}

    def add(self, layers: np.ndarray, readers: Sequence[int], gb: float, ms: float) -> None:
        """A cost that any option of these layers, or any of ``readers``, causes."""
        cost = np.array([gb, ms])
        if layers[-1]:  # what trains in every choice
            self.base += cost
            return
        cause = 0
        for number in np.flatnonzero(layers[:-1]):
            cause |= self.of_recorded[number]
        for entry in readers:
            cause |= 1 << entry
        if cause and cost.any():
            self.causes[cause] = self.causes.get(cause, np.zeros(2)) + cost

    def charges(self) -> tuple[tuple[GroupCharge, ...], DepthCharge | None]:
        """Causes that are nested or apart: those of the longest chain as depth, the others as group charges."""
        causes = _laminar(self.causes)
        for cause in [cause for cause in causes if cause & (cause - 1) == 0]:  # of one option alone
            self.own[:, cause.bit_length() - 1] += causes.pop(cause)
        chain = self._chain(causes)
        depth = self._depth(chain, causes) if len(chain) > 1 else None
        if depth is not None:
            for cause in chain:
                del causes[cause]
        ordered = sorted(causes, key=lambda cause: (-cause.bit_count(), cause))
        found = []
        for number, cause in enumerate(ordered):
            inside = [other for other in range(number) if cause & ordered[other] == cause]
            found.append(
                GroupCharge(
                    self._name(cause),
                    tuple(entry for entry in range(len(self.options)) if cause >> entry & 1),
                    causes[cause],
                    inside[-1] if inside else None,
                )
            )
        return tuple(found), depth

    def _chain(self, causes: dict[int, np.ndarray]) -> list[int]:
        """The longest chain of nested causes, all options of whole layers, the smallest first."""
        whole = [cause for cause in causes if all(cause & layer in (0, layer) for layer in self.of_layer)]
        whole.sort(key=lambda cause: cause.bit_count())
        best: dict[int, list[int]] = {}
        for number, cause in enumerate(whole):
            below = [best[other] for other in whole[:number] if other & cause == other]
            best[cause] = [*max(below, key=len, default=[]), cause]
        return max(best.values(), key=len, default=[])

    def _depth(self, chain: Sequence[int], causes: dict[int, np.ndarray]) -> DepthCharge:
        stage__g = np.full(len(self.names), -1, dtype=np.int64)
        for stage in range(len(chain) - 1, -1, -1):
            for number, of_layer in enumerate(self.of_layer):
                if of_layer and of_layer & chain[stage] == of_layer:
                    stage__g[number] = stage
        names = []
        for stage in range(len(chain)):
            own = [self.names[number] for number in np.flatnonzero(stage__g == stage)]
            names.append(", ".join(own))
        cost__sr = np.cumsum(np.array([causes[cause] for cause in chain])[::-1], axis=0)[::-1]
        return DepthCharge(stage__g, tuple(names), np.ascontiguousarray(cost__sr))

    def _name(self, cause: int) -> str:
        named = dict.fromkeys(self.options[entry].layer for entry in range(len(self.options)) if cause >> entry & 1)
        first, *others = named
        return first if not others else f"{first} and {len(others)} more"


def _laminar(causes: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """The same costs with causes that are nested or apart: of two that cross, the cheaper is widened to both."""
    left = dict(causes)
    waiting = sorted(left, key=lambda cause: (cause.bit_count(), cause))
    while waiting:
        cause = waiting.pop()
        if cause not in left:
            continue
        crossing = next((other for other in left if other & cause not in (0, cause, other)), None)
        if crossing is None:
            continue
        cheaper, dearer = sorted((cause, crossing), key=lambda one: (float(left[one].sum()), one))
        widened = left.pop(cheaper)
        both = cheaper | dearer
        left[both] = left.get(both, np.zeros(2)) + widened
        waiting += [both, dearer]
    return left
