"""Where statistics are computed: by the compiled kernels in main memory, by torch on a device where tensors are there.

Both ways give the same numbers to rounding. On a device nothing leaves it but sums: norms of samples, and statistics.
"""

from __future__ import annotations

import torch


def uses_kernels(tensor: torch.Tensor) -> bool:
    """Whether the kernels (and SciPy's BLAS) can read the tensor where it is."""
    return tensor.device.type == "cpu"
