"""FLOPs of a forward pass as torch counts them, and by their shapes those that it leaves out."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from layerlens.integrations.operations import MORE_FLOPS
from layerlens.integrations.quantized import quantized_layers


def plain_counter() -> FlopCounterMode:
    """torch's counter, with the fused attention and recurrent layers of a CPU, which it leaves out."""
    return FlopCounterMode(display=False, custom_mapping=MORE_FLOPS)


class FlopCounter(FlopCounterMode):
    """Counts while it is open, in all and by module.

    A quantized layer is a product of its shape, whichever kernel unpacks the weight and multiplies: torch knows few of
    these kernels, and which one is taken depends on the device and the batch.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(display=False, custom_mapping=MORE_FLOPS)
        self._layers = list(quantized_layers(model).values())
        self._handles: list[Any] = []
        self._inside: list[tuple[set[str], int]] = []

    def __enter__(self) -> FlopCounter:
        for layer in self._layers:
            self._handles.append(layer.register_forward_pre_hook(self._enter))
            self._handles.append(layer.register_forward_hook(self._leave))
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> Any:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        return super().__exit__(*args)

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        self._inside.append((set(self.mod_tracker.parents), self.get_total_flops()))

    def _leave(self, module: Any, args: Any, output: torch.Tensor) -> None:
        within, before = self._inside.pop()  # the tracker has left the module by now
        missed = 2 * output.numel() * int(module.in_features) - (self.get_total_flops() - before)
        for name in within:
            self.flop_counts[name][torch.ops.aten.mm] += missed
