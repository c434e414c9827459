"""Tensor operations as they run: the kind of each, its FLOPs and bytes, and what is allocated and alive.

Works on tensors with data and on fake ones, which have shapes, strides and lifetimes and no data.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from layerlens.integrations.workspace import RECURRENT, RECURRENT_BACKWARD, Workspace, with_gates, workspace
from layerlens.models.step import (
    ATTENTION,
    CURVE,
    MATMUL,
    MEMORY,
    NORM,
    RANDOM,
    REUSED_BYTES,
    SAFE_SOFTMAX,
    SLOPE,
    STRIDED,
    VIEW,
    TracedOperation,
)


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    flops: int = sdpa_flop_count(query, key, value)
    return flops


def _attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    flops: int = sdpa_backward_flop_count(gradient, query, key, value)
    return flops


def _recurrent_flops(inputs: Any, from_input: Any, from_state: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(inputs[:2]) * (math.prod(from_input) + math.prod(from_state))


def _recurrent_backward_flops(inputs: Any, from_input: Any, from_state: Any, *_: Any, **__: Any) -> int:
    return 2 * _recurrent_flops(inputs, from_input, from_state)  # of the input, and always of the weights


MORE_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable: _attention_flops,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable_backward: _attention_backward_flops,
    RECURRENT.overloadpacket: _recurrent_flops,
    RECURRENT_BACKWARD.overloadpacket: _recurrent_backward_flops,
}
"""FLOPs by shapes of what torch's own counter leaves out: fused attention, and recurrent layers of a CPU."""
FLOPS: Any = FlopCounterMode(display=False, custom_mapping=MORE_FLOPS).flop_registry
"""FLOPs of an operation, by its name without its overload."""

_NAMES = (
    (RANDOM, ("bernoulli", "dropout", "normal_", "uniform_", "rand")),
    (SAFE_SOFTMAX, ("_safe_softmax",)),
    (NORM, ("softmax", "norm")),
    (SLOPE, ("gelu_backward", "silu_backward", "mish_backward")),
    (MEMORY, ("tanh_backward", "sigmoid_backward")),  # from the result, without a function
    (CURVE, ("gelu", "silu", "tanh", "exp", "erf", "pow", "sigmoid", "rsqrt")),
)
"""What the name of an operation contains that is of a kind; the first match counts."""


class OperationRecorder(TorchDispatchMode):
    """While open, notes every operation, and how many bytes are alive that were allocated since it was made.

    Attributes:
        operations: in the order they ran.
        alive, peak: bytes.
        workspace: bytes that the last of them had for itself.
        uncounted: operations whose own memory is not counted, with the reason.
        in_recurrent: whether what runs is a recurrent layer. Its product with the input adds the bias in place, but not
            while a mode like this one is open.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[TracedOperation] = []
        self.alive, self.peak, self.workspace = 0, 0, 0
        self.uncounted: dict[str, str] = {}
        self.in_recurrent = False
        self.known = weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.in_recurrent and func is torch.ops.aten.add.Tensor and args[1].dim() == 1:
            func = torch.ops.aten.add_.Tensor
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim":
            return out
        packet, name = func._overloadpacket, str(func)
        flops = 0.0
        if packet in FLOPS:
            flops = float(FLOPS[packet](*args, **(kwargs or {}), out_val=out))
        own = workspace(func, args, kwargs or {}, out, flops)
        if func is RECURRENT:
            out = with_gates(out, own.gates)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        sources = {storage_id(tensor) for tensor in operands}
        schema = func._schema
        # A view of a weight has the storage of its fake twin, which is no allocation either.
        aliases = any(returned.alias_info is not None for returned in schema.returns)
        new = [] if aliases else [tensor for tensor in results if storage_id(tensor) not in sources]
        fresh = sum([self._allocated(tensor.untyped_storage()) for tensor in new])
        works = schema.is_mutable or bool(new)
        self.workspace = self._own(name, own) if new else 0
        self.peak = max(self.peak, self.alive + self.workspace)
        kind = VIEW
        if works:
            kind = kind_of(name, flops, operands)
        n_bytes = float(sum(map(touched, (*operands, *results)))) if kind != VIEW else 0.0
        self.operations.append(TracedOperation(kind, flops, n_bytes, fresh))
        self.ran(func, args, kwargs or {}, out)
        return out

    def _own(self, name: str, own: Workspace) -> int:
        if own.uncounted:
            self.uncounted.setdefault(name.rpartition(".")[0] or name, own.uncounted)
        return own.n_bytes

    def ran(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Called after every operation, which is the last of ``operations``; nothing unless redefined."""

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


def kind_of(name: str, flops: float, operands: list[torch.Tensor]) -> str:
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


def storage_id(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def touched(tensor: torch.Tensor) -> int:
    """Bytes of a tensor that are read or written: not more than there are, where a dimension is only expanded."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@contextmanager
def buffers_standing_still(model: torch.nn.Module) -> Iterator[None]:
    """Buffers stand still: a fake tensor copied into a real one (running statistics) is an error."""
    fakes: dict[int, torch.Tensor] = {}
    with _replaced(model, "_buffers", lambda buffer: fakes.setdefault(id(buffer), torch.empty_like(buffer))):
        yield


@contextmanager
def weights_without_data(model: torch.nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Parameters are fake ones of ``mode``: for real ones, it looks at every operation on them anew."""
    plain = (torch.nn.Parameter, torch.Tensor)
    with _replaced(model, "_parameters", lambda one: mode.from_tensor(one) if type(one) in plain else one):
        yield


@contextmanager
def _replaced(model: torch.nn.Module, kind: str, twin: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """While open, the model's tensors of a kind ("_buffers" or "_parameters") are their twins."""
    owners = [(getattr(module, kind), dict(getattr(module, kind))) for module in model.modules()]
    try:
        for tensors, own in owners:
            tensors.update({name: twin(tensor) for name, tensor in own.items() if tensor is not None})
        yield
    finally:
        for tensors, own in owners:
            tensors.update(own)
