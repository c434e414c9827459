"""What one option adds to one forward pass and to one training step, from shapes alone.

Every option is a short list of tensor operations; FLOPs, kept activations and latency all follow from that list.
"""

from __future__ import annotations

from dataclasses import dataclass

from layerlens.exceptions import ModelSpecError
from layerlens.models import LayerSpec

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Operation:
    """One tensor operation for one token, patch or pixel (weights apart).

    Args:
        flops: matrix-product FLOPs per token (2 per multiply-add); element-wise work is memory traffic, not FLOPs, as
            in ``torch.utils.flop_counter``.
        elements: elements read and written per token.
        weights: parameters read once for each call.
    """

    flops: float
    elements: float
    weights: int = 0


def operations(layer: LayerSpec, method: str, rank: int) -> list[Operation]:
    """The operations that the option adds to the forward pass of ``layer``."""
    n_in, n_out = layer.n_in, layer.n_out
    if method == "none":
        return []
    if method == "lora":  # A x, B (A x), times alpha/r, plus the frozen output; B of a convolution has its groups
        in_group = rank // layer.groups
        return [
            Operation(2 * n_in * rank, layer.inputs_per_position + rank, n_in * rank),
            Operation(2 * in_group * n_out, rank + n_out, in_group * n_out),
            Operation(0, 2 * n_out),
            Operation(0, 3 * n_out),
        ]
    if method == "adapter":  # D y + b, GELU, U (...) + c, plus y
        return [
            Operation(2 * n_out * rank, n_out + rank, n_out * rank + rank),
            Operation(0, 2 * rank),
            Operation(2 * rank * n_out, rank + n_out, rank * n_out + n_out),
            Operation(0, 3 * n_out),
        ]
    if method == "prefix":  # q Pkᵀ, softmax, (...) Pv, times tanh(gate), plus the output
        width, scores = layer.n_out, layer.num_heads * rank
        return [
            Operation(2 * width * rank, width + scores, rank * layer.d_kv),
            Operation(0, 2 * scores),
            Operation(2 * width * rank, scores + width, rank * layer.d_kv),
            Operation(0, 2 * width),
            Operation(0, 3 * width),
        ]
    raise ModelSpecError(f"{layer.name}: unknown method {method!r}")


def kept_elements(layer: LayerSpec, method: str, rank: int) -> float:
    """Elements per token that the option's backward pass needs and that the frozen model may not keep: an upper bound.

    LoRA keeps its input h (shared by q, k and v where all are adapted, which this bound counts each time) and A h; an
    adapter keeps y and both sides of its activation; a prefix keeps q, its attention weights and its output.
    """
    if method == "lora":
        return layer.inputs_per_position + rank
    if method == "adapter":
        return layer.n_out + 2 * rank
    if method == "prefix":
        return 2 * layer.n_out + 2 * layer.num_heads * rank
    return 0
