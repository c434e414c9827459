"""What a training step does, without doing it: every tensor operation and every allocation, on tensors without data.

The step runs on fake tensors (``torch._subclasses.FakeTensorMode``): shapes, strides and lifetimes are those of the
real step, so which activations are kept, and when they are freed, needs no rule of thumb. It takes no memory and works
for models that would not fit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

MATMUL, ATTENTION, RANDOM, NORM, SAFE_SOFTMAX, CURVE, STRIDED, MEMORY, VIEW = (
    "matmul", "attention", "random", "norm", "safe_softmax", "curve", "strided", "memory", "view",
)  # fmt: skip
KINDS = (MATMUL, ATTENTION, RANDOM, NORM, SAFE_SOFTMAX, CURVE, STRIDED, MEMORY, VIEW)
"""Matrix products; fused attention; random numbers (dropout); normalisations of rows (softmax, layer norm); the softmax
of attention that is not fused, which looks for rows that are masked whole; functions of every element (GELU, tanh);
copies between layouts; operations that only move elements; and those that move nothing."""
_NAMES = (
    (RANDOM, ("bernoulli", "dropout", "normal_", "uniform_", "rand")),
    (SAFE_SOFTMAX, ("_safe_softmax",)),
    (NORM, ("softmax", "norm")),
    (CURVE, ("gelu", "silu", "tanh", "exp", "erf", "pow", "sigmoid", "rsqrt")),
)
"""What the name of an operation contains that is of a kind; the first match counts."""

REUSED_BYTES = 32 * 2**20
"""The largest block that glibc keeps for reuse once it is freed (mallopt(3), ``M_MMAP_THRESHOLD``); a larger one is
memory new to the process each time, which the kernel must zero page by page."""


@dataclass(frozen=True)
class TracedOperation:
    """One operation: its kind (of ``KINDS``), FLOPs, bytes read and written, and bytes of new blocks never reused."""

    kind: str
    flops: float
    n_bytes: float
    fresh_bytes: float = 0.0


@dataclass(frozen=True)
class StepTrace:
    """A traced step.

    Args:
        operations: in the order they ran.
        peak_bytes: largest sum of what was allocated and alive in it; weights, inputs and optimiser state not counted.
    """

    operations: tuple[TracedOperation, ...]
    peak_bytes: int

    @property
    def flops(self) -> float:
        """Matrix-product FLOPs of all operations."""
        return sum(operation.flops for operation in self.operations)


def trace_step(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], loss: Callable[[Any], torch.Tensor] | None = None
) -> StepTrace:
    """Forward and backward pass of ``model`` on ``batch``, traced; nothing of the model changes.

    Args:
        model: in the mode that is wanted.
        batch: keyword arguments of the model.
        loss: from its output to a scalar; its own loss unless given.
    """
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    recorder = _Recorder()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.random.fork_rng(devices=[]):
            inputs = {name: fake.from_tensor(tensor) for name, tensor in batch.items()}
            for parameter in model.parameters():
                parameter.grad = None
            with _without_buffer_updates(model), recorder:
                # As in a training loop, nothing but the loss lives on when the backward pass begins.
                value = _own_loss(model(**inputs)) if loss is None else loss(model(**inputs))
                if value.requires_grad:
                    value.backward()
                del value
    finally:
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
    return StepTrace(tuple(recorder.operations), recorder.peak)


def _own_loss(output: Any) -> torch.Tensor:
    value: torch.Tensor = output.loss
    return value


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[TracedOperation] = []
        self.alive, self.peak = 0, 0
        self.known = weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim":
            return out
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        sources = {_storage_id(tensor) for tensor in operands}
        schema = func._schema
        # A view of a weight has the storage of its fake twin, which is no allocation either.
        aliases = any(returned.alias_info is not None for returned in schema.returns)
        new = [] if aliases else [tensor for tensor in results if _storage_id(tensor) not in sources]
        fresh = sum([self._allocated(tensor.untyped_storage()) for tensor in new])
        works = schema.is_mutable or bool(new)
        packet, name = func._overloadpacket, str(func)
        flops = 0.0
        if packet in flop_registry:
            flops = float(flop_registry[packet](*args, **(kwargs or {}), out_val=out))
        kind = VIEW
        if works:
            kind = _kind(name, flops, operands)
        n_bytes = float(sum(map(_touched, (*operands, *results)))) if kind != VIEW else 0.0
        self.operations.append(TracedOperation(kind, flops, n_bytes, fresh))
        return out

    def _allocated(self, storage: Any) -> int:
        """Bytes of it that are new to the process."""
        if storage in self.known:
            return 0
        self.known.add(storage)
        n_bytes = storage.nbytes()
        self.alive += n_bytes
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._freed, n_bytes)
        return n_bytes if n_bytes > REUSED_BYTES else 0

    def _freed(self, n_bytes: int) -> None:
        self.alive -= n_bytes


def _kind(name: str, flops: float, operands: list[torch.Tensor]) -> str:
    """The kind of an operation that allocates or changes something."""
    if flops:
        return ATTENTION if "attention" in name else MATMUL
    if "empty" in name:  # allocates, and writes nothing
        return VIEW
    for kind, words in _NAMES:
        if any(word in name for word in words):
            return kind
    copies = name.startswith(("aten.clone", "aten.copy_", "aten._to_copy"))
    return STRIDED if copies and not all(operand.is_contiguous() for operand in operands) else MEMORY


def _storage_id(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _touched(tensor: torch.Tensor) -> int:
    """Bytes of a tensor that are read or written: not more than there are, where a dimension is only expanded."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@contextmanager
def _without_buffer_updates(model: torch.nn.Module) -> Iterator[None]:
    """Buffers stand still: a fake tensor copied into a real one (running statistics) is an error."""
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    fakes: dict[int, torch.Tensor] = {}
    for module, name, buffer in buffers:
        module._buffers[name] = fakes.setdefault(id(buffer), torch.empty_like(buffer))
    try:
        yield
    finally:
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
