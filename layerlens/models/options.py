"""The choices of one layer: a PEFT method and its size, and how many parameters each trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layerlens.exceptions import ModelSpecError
from layerlens.models.model_spec import LayerSpec, ModelSpec

NONE, LORA, ADAPTER, PREFIX = "none", "lora", "adapter", "prefix"
METHODS = (NONE, LORA, ADAPTER, PREFIX)


@dataclass(frozen=True)
class Option:
    """One choice for one layer.

    ``rank`` is the LoRA rank r, the adapter bottleneck width k or the number of prefix pairs p; 0 exactly for "none".
    """

    layer: str
    method: str
    rank: int


def trainable_params(layer: LayerSpec, method: str, rank: int) -> int:
    """Parameters that ``method`` with ``rank`` trains on ``layer`` (exact).

    LoRA r(n_in + n_out) (Hu et al. 2022), with n_out / groups for a convolution's; serial
    bottleneck adapter 2·n_out·k + k + n_out (Houlsby et al. 2019);
    prefix 2·p·d_kv (Li & Liang 2021) plus one gate for each attention head, which makes step 0 exact.
    """
    if method == NONE:
        return 0
    if method == LORA:
        return rank * (layer.n_in + layer.n_out // layer.groups)
    if method == ADAPTER:
        return 2 * layer.n_out * rank + rank + layer.n_out
    if method == PREFIX:
        return 2 * rank * layer.d_kv + layer.num_heads
    raise ModelSpecError(f"unknown method {method!r}; known: {', '.join(METHODS)}")


def enumerate_options(spec: ModelSpec, ranks: Mapping[str, Sequence[int]]) -> tuple[Option, ...]:
    """Every option of every layer, "none" first in each layer, methods in the order of METHODS, ranks ascending.

    ``ranks`` maps a method to its allowed sizes; a method that is absent or empty is not offered. A grouped convolution
    gets the LoRA ranks that are multiples of its groups.
    """
    options = []
    for layer in spec.layers:
        options.append(Option(layer.name, NONE, 0))
        for method in METHODS[1:]:
            if method in layer.methods:
                sizes = sorted(set(ranks.get(method, ())))
                options.extend(Option(layer.name, method, size) for size in sizes if size % layer.groups == 0)
    return tuple(options)
