"""The operations of a forward pass, and what autograd says of each of them by itself.

Everything happens on tensors without data.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from layerlens.integrations.operations import OperationRecorder
from layerlens.integrations.workspace import RECURRENT, WithGates
from layerlens.models.step import TracedOperation


@dataclass(frozen=True)
class DescribedTensor:
    """What an operation's argument or result was: which storage, how it lies in it, and which of its views it is."""

    storage: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    serial: int

    @property
    def key(self) -> tuple[Any, ...]:
        return self.shape, self.stride, self.dtype, self.device

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def differentiable(self) -> bool:
        return self.dtype.is_floating_point or self.dtype.is_complex


@dataclass(frozen=True)
class RecordedCall:
    """One operation of the forward pass, with its arguments flattened, and bytes that it has for itself."""

    function: Any
    leaves: tuple[Any, ...]
    spec: TreeSpec
    results: tuple[DescribedTensor, ...]
    traced: TracedOperation
    workspace: int = 0


@dataclass(frozen=True)
class LayerEvent:
    """Before operation ``at`` so many storages went into a layer (or came out of it)."""

    at: int
    layer: int
    side: int
    storage: int
    element_bytes: int


class ForwardRecorder(OperationRecorder):
    """Notes operations with the storages that they read and write, and when storages come and go."""

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.calls: list[RecordedCall] = []
        self.n_bytes: list[int] = []
        self.born: list[int] = []
        self.died: dict[int, int] = {}
        self.fixed: set[int] = set()
        self._number: dict[int, int] = {}
        self._serial: dict[int, int] = {}
        self._serials = itertools.count()
        self.held = [tensor.untyped_storage() for tensor in weights]
        for storage in self.held:
            self.fixed.add(self._new(storage))

    def number(self, tensor: torch.Tensor) -> int:
        """A number for the tensor's storage that no other storage of this step has."""
        storage = tensor.untyped_storage()
        found = self._number.get(storage._cdata)
        return self._new(storage) if found is None else found

    def _new(self, storage: Any) -> int:
        place, number = storage._cdata, len(self.n_bytes)
        if place in self._number:
            return self._number[place]
        self._number[place] = number
        self.n_bytes.append(storage.nbytes())
        self.born.append(len(self.calls))
        weakref.finalize(storage, self._gone, place, number)
        return number

    def _gone(self, place: int, number: int) -> None:
        self.died[number] = len(self.calls)
        self._number.pop(place, None)

    def described(self, tensor: torch.Tensor) -> DescribedTensor:
        serial = self._serial.get(id(tensor))
        if serial is None:
            serial = self._serial[id(tensor)] = next(self._serials)
            weakref.finalize(tensor, self._serial.pop, id(tensor), None)
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        return DescribedTensor(self.number(tensor), shape, stride, tensor.dtype, tensor.device, serial)

    def ran(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        leaves, spec = tree_flatten((args, kwargs))
        described = tuple(self.described(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        results = tuple(self.described(leaf) for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
        operands = {leaf.storage for leaf in described if isinstance(leaf, DescribedTensor)}
        if operands and operands <= self.fixed and any(one.alias_info for one in func._schema.returns):
            self.fixed |= {result.storage for result in results}  # a view of a weight
        self.calls.append(RecordedCall(func, described, spec, results, self.operations[-1], self.workspace))


@dataclass(frozen=True)
class BackwardOf:
    """What autograd says of one operation.

    Args:
        needs_grad: places of the results that have a gradient.
        kept: what is kept: ("leaf", place), ("result", place) or ("own", bytes).
        operations: of its backward pass.
        peak: most bytes that these have alive at one time.
        gradients: for each differentiated leaf the bytes of its gradient; None where it is that of the result itself,
            and absent where there is none.
        uncounted: operations whose own memory is not in the peak, with the reason.
    """

    needs_grad: tuple[int, ...]
    kept: frozenset[tuple[str, int]]
    operations: tuple[TracedOperation, ...]
    peak: int
    gradients: dict[int, int | None]
    uncounted: dict[str, str] = field(default_factory=dict)


MOST_KNOWN = 20_000
"""Answers that a process keeps; a model of one kind of block asks for about a hundred."""


class Autograd:
    """Asks autograd about single operations; every question once in a process, for the answer depends on it alone."""

    known: ClassVar[dict[Any, BackwardOf]] = {}

    def __call__(self, call: RecordedCall, active: tuple[int, ...]) -> BackwardOf:
        first: dict[Any, int] = {}
        leaves: list[Any] = []
        for leaf in call.leaves:
            if isinstance(leaf, DescribedTensor):
                leaves.append((*leaf.key, first.setdefault((leaf.storage, leaf.key), len(first))))
            else:
                leaves.append(repr(leaf))
        key = (call.function, str(call.spec), tuple(leaves), active)
        if key not in self.known:
            if len(self.known) >= MOST_KNOWN:
                self.known.clear()
            self.known[key] = _differentiated(call, active)
        return self.known[key]


def _differentiated(call: RecordedCall, active: tuple[int, ...]) -> BackwardOf:
    kept: list[torch.Tensor] = []
    with FakeTensorMode(), torch.enable_grad():
        made: dict[Any, torch.Tensor] = {}
        leaves, roots = list(call.leaves), {}
        for place, leaf in enumerate(call.leaves):
            if not isinstance(leaf, DescribedTensor):
                continue
            alike = (leaf.storage, leaf.key)
            if alike not in made:
                tensor = torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device=leaf.device)
                made[alike] = tensor.requires_grad_(place in active)
            roots[place] = made[alike]
            # What is changed in place must not be a leaf of the graph.
            leaves[place] = made[alike].clone() if call.function._schema.is_mutable and place in active else made[alike]
        args, kwargs = tree_unflatten(leaves, call.spec)

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), WithGates():
            out = call.function(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        found = frozenset(_names(kept, leaves, results))
        needs_grad = tuple(place for place, result in enumerate(results) if result.requires_grad)
        if not needs_grad:
            return BackwardOf((), frozenset(), (), 0, {})
        # Of several results the first has the gradient (the others are masks, means); of a list each has one.
        ends = [results[place] for place in (needs_grad if isinstance(out, list) else needs_grad[:1])]
        ones = [torch.empty_like(end) for end in ends]
        if call.function is RECURRENT:  # its gradient is a part of others', or lies across: it is laid out anew
            ones = [one.mT.contiguous().mT for one in ones]
        recorder = OperationRecorder()
        inputs = [roots[place] for place in active]
        with recorder:
            gradients = torch.autograd.grad(ends, inputs, ones, allow_unused=True)
        given = {one.untyped_storage()._cdata for one in ones}
        sizes: dict[int, int | None] = {}
        for place, gradient in zip(active, gradients, strict=True):
            if gradient is not None:
                storage = gradient.untyped_storage()
                sizes[place] = None if storage._cdata in given else storage.nbytes()
        return BackwardOf(needs_grad, found, tuple(recorder.operations), recorder.peak, sizes, recorder.uncounted)


def _names(
    kept: Sequence[torch.Tensor], leaves: Sequence[Any], results: Sequence[torch.Tensor]
) -> Iterator[tuple[str, int]]:
    places: dict[int, tuple[str, int]] = {}
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            places.setdefault(leaf.untyped_storage()._cdata, ("leaf", place))
    for place, result in enumerate(results):
        places.setdefault(result.untyped_storage()._cdata, ("result", place))
    for number, tensor in enumerate(kept):
        storage = tensor.untyped_storage()
        if storage._cdata in places:
            yield places[storage._cdata]
        elif tensor.dim():  # a number beside a tensor (x * 0.5) is kept in the graph itself
            yield ("own", storage.nbytes() + 0 * number)
