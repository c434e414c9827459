"""Memory that an operation takes for itself while it runs, which tensors without data do not show.

oneDNN's convolutions lay out their input, weight and result anew; fused attention, softmax and norms have buffers. How
large these are depends on shapes, on the kernels of this machine and on its threads. So such an operation is run once,
by itself, on made-up inputs of the same shapes, and the allocator says what it took.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

from layerlens.integrations.allocations import peaks_of
from layerlens.utils.free_memory import available_bytes

NAMES = ("convolution", "flash_attention_for_cpu", "softmax", "_norm", "_fft", "_pool", "grid_sampler", "upsample")
"""What the names of such operations contain; copies, products of matrices and functions of every element have none.
Recurrent layers, and fused attention of a GPU, are not among them: their backward passes read states that cannot be
made up. So do those of cuDNN's and MIOpen's norms."""
WITH_STATES = ("cudnn", "miopen")
MOST_FLOPS = 1e12
"""Of an operation that is run for this: ten seconds on a slow core."""
MOST_KNOWN = 20_000
_known: dict[Any, int] = {}


def workspace_bytes(func: Any, args: Any, kwargs: Any, visible: int, flops: float) -> int:
    """Bytes that ``func`` has allocated at its peak beside its results; 0 where it cannot be run here.

    Args:
        func: the operation.
        args, kwargs: of it; tensors may have no data.
        visible: bytes of its results that are new.
        flops: of it.
    """
    name = str(func)
    if flops > MOST_FLOPS or not any(part in name for part in NAMES) or any(part in name for part in WITH_STATES):
        return 0
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    places = {tensor.device for tensor in tensors}
    if not tensors or torch.device("meta") in places or torch.autograd._profiler_enabled():
        return 0
    key = (func, str(spec), torch.get_num_threads(), *map(_described, leaves))
    if key not in _known:
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        _known[key] = _measured(func, leaves, spec, visible)
    return _known[key]


def _described(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype, leaf.device
    return repr(leaf)


def _measured(func: Any, leaves: list[Any], spec: Any, visible: int) -> int:
    needed = visible + sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, torch.Tensor))
    if 4 * needed > available_bytes():
        return 0
    shapes = [_described(leaf) if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
    with _disable_current_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        made = [leaf if shape is None else _made_up(*shape) for leaf, shape in zip(leaves, shapes, strict=True)]
        args, kwargs = tree_unflatten(made, spec)
        try:
            (peak,) = peaks_of([lambda: func(*args, **kwargs)])
        except (RuntimeError, NotImplementedError, TypeError, ValueError):  # it looks at numbers
            return 0
    return max(0, peak - visible)


def _made_up(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    return torch.empty_strided(shape, stride, dtype=dtype, device=device).zero_()
