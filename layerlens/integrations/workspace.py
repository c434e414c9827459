"""Memory that an operation takes for itself while it runs, which tensors without data do not show.

oneDNN's convolutions lay out their input, weight and result anew; fused attention, softmax and norms have buffers, and
recurrent layers keep their gates for the backward pass. How large these are depends on shapes, on the kernels of this
machine and on its threads. So such an operation is run once, by itself, on made-up inputs of the same shapes, and the
allocator says what it took. Where that cannot be done, nothing is counted, and the reason comes back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from layerlens.integrations.allocations import peaks_of
from layerlens.utils.free_memory import available_bytes

NAMES = (
    "convolution", "flash_attention_for_cpu", "mkldnn_rnn_layer", "softmax", "_norm", "_fft", "_pool", "grid_sampler",
    "upsample",
)  # fmt: skip
"""What the names of such operations contain; copies, products of matrices and functions of every element have none."""
WITH_STATES = ("cudnn", "miopen", "flash_attention", "efficient_attention")
"""Of these, on a GPU, the backward pass reads states of a library or of a random generator."""
RECURRENT = torch.ops.aten.mkldnn_rnn_layer.default
RECURRENT_BACKWARD = torch.ops.aten.mkldnn_rnn_layer_backward.default
GATES = 3
"""Which result of a recurrent layer has its gates; torch gives it no bytes where tensors have no data."""
PAGES = 6 * 4096
"""oneDNN begins each of the six parts of it on a page, so that its size does not lie on a line through two batches."""
MOST_FLOPS = 1e12
"""Of an operation that is run for this: ten seconds on a slow core."""
MOST_KNOWN = 20_000
_known: dict[Any, Workspace] = {}


@dataclass(frozen=True)
class Workspace:
    """What an operation has for itself.

    Args:
        n_bytes: at its peak, beside its results.
        gates: bytes that a recurrent layer keeps for its backward pass.
        uncounted: why nothing could be counted; "" where all is.
    """

    n_bytes: int = 0
    gates: int = 0
    uncounted: str = ""


def workspace(func: Any, args: Any, kwargs: Any, out: Any, flops: float) -> Workspace:
    """What ``func`` allocates at its peak beside its results.

    Args:
        func: the operation.
        args, kwargs: of it; tensors may have no data.
        out: its results.
        flops: of it.
    """
    name = str(func)
    stateful = any(part in name for part in WITH_STATES) and "for_cpu" not in name
    if not stateful and not any(part in name for part in NAMES):
        return Workspace()
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if not tensors:
        return Workspace()
    if stateful or (func is RECURRENT_BACKWARD and not tensors[-1].numel()):
        return Workspace(uncounted="it reads states that cannot be made up")
    if flops > MOST_FLOPS:
        return Workspace(uncounted="it is too large to be tried")
    if any(tensor.device.type == "meta" for tensor in tensors):
        return Workspace(uncounted="its tensors are on no device")
    if torch.autograd._profiler_enabled():
        return Workspace(uncounted="torch's profiler is at work")
    key = (func, str(spec), torch.get_num_threads(), torch.is_grad_enabled(), *map(_described, leaves))
    if key not in _known:
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        needed = 4 * sum(tensor.numel() * tensor.element_size() for tensor in (*tensors, *results))
        free = available_bytes()
        if needed > free:  # not kept: it may be free later
            return Workspace(uncounted=f"a trial may need {1e-9 * needed:.2g} GB, and {1e-9 * free:.2g} GB are free")
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        _known[key] = _measured(func, leaves, spec)
    return _known[key]


def with_gates(out: Any, gates: int) -> Any:
    """The results of a recurrent layer on tensors without data, with the bytes that it keeps for its backward pass."""
    kept = out[GATES]
    without_size = isinstance(kept, FakeTensor) and not kept.numel()
    return (*out[:GATES], kept.new_empty(gates)) if without_size else out


class WithGates(TorchDispatchMode):
    """While open, recurrent layers return what they keep for their backward pass in its size."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return with_gates(out, workspace(func, args, kwargs or {}, out, 0.0).gates) if func is RECURRENT else out


def _described(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype, leaf.device
    return repr(leaf)


def _measured(func: Any, leaves: list[Any], spec: Any) -> Workspace:
    shapes = [_described(leaf) if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
    made_of: list[int] = []
    with _disable_current_modes(), torch.random.fork_rng(devices=[]):
        made = [leaf if shape is None else _made_up(*shape) for leaf, shape in zip(leaves, shapes, strict=True)]
        args, kwargs = tree_unflatten(made, spec)
        given = {leaf.untyped_storage()._cdata for leaf in made if isinstance(leaf, torch.Tensor)}

        def run() -> None:
            out = func(*args, **kwargs)
            storages = {
                leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes()
                for leaf in tree_leaves(out)
                if isinstance(leaf, torch.Tensor)
            }
            made_of[:] = [n_bytes for place, n_bytes in storages.items() if place not in given]
            if func is RECURRENT:
                made_of.append(0 if out[GATES] is None else out[GATES].numel())

        try:
            (peak,) = peaks_of([run])
        except RuntimeError as error:  # it looks at numbers, or has no kernel for these
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            return Workspace(uncounted=f"a trial fails ({reason})")
    gates = made_of.pop() if func is RECURRENT else 0
    gates += PAGES if gates else 0
    return Workspace(max(0, peak - sum(made_of)), gates)


def _made_up(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    return torch.empty_strided(shape, stride, dtype=dtype, device=device).zero_()
