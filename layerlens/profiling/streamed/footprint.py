"""What a step of the frozen model keeps and computes (``footprint.frozen_footprint``), counted block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from layerlens.profiling.footprint import samples_in
from layerlens.profiling.streamed.parts import BlockCall, ModelParts
from layerlens.tasks.losses import output_tensors


class StreamedFootprint:
    """Counts storages that autograd keeps, each once, and FLOPs, on a full batch.

    Args:
        inputs: of the full batch.
    """

    def __init__(self, inputs: dict[str, torch.Tensor]) -> None:
        self.inputs = inputs
        self.kept_bytes = 0
        self.flops = 0
        self.counted: list[int] = []  # which of the blocks' arguments were counted, by their position
        self.boundary_counted = False
        self._calls: list[BlockCall] = []
        self._shapes: dict[str, Any] = {}
        self._arguments: list[torch.Tensor] = []

    @property
    def state(self) -> dict[str, Any]:
        """What has been counted, as JSON values."""
        names = ("kept_bytes", "flops", "counted", "boundary_counted")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from an earlier state."""
        for name, value in state.items():
            setattr(self, name, value)

    def per_sample(self) -> tuple[float, float]:
        """(bytes kept, FLOPs) of a token, or of a sample where there are no tokens."""
        count = samples_in(self.inputs)
        return self.kept_bytes / count, self.flops / count

    def run_front(self, parts: ModelParts, device: torch.device) -> torch.Tensor:
        """The first block's activations."""
        self.inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        with FlopCounterMode(display=False) as counter:
            found = parts.run_front(self.inputs)
        self.flops = counter.get_total_flops()
        self._calls, self._shapes = found.calls, found.shapes
        leaves = tree_leaves([(call.args, call.kwargs) for call in found.calls])
        self._arguments = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        return found.hidden

    def run_block(self, parts: ModelParts, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """The activations after a block."""
        return self._run(parts, hidden, lambda: parts.run_block(number, hidden, self._calls[number]))

    def run_tail(self, parts: ModelParts, hidden: torch.Tensor) -> None:
        """The tail, down to a number that every part of the output goes into."""
        self._run(parts, hidden, lambda: _total(parts.run_tail(self.inputs, hidden, self._shapes)))

    def _run(self, parts: ModelParts, hidden: torch.Tensor, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        self.flops += counter.get_total_flops()
        seen = {x.untyped_storage().data_ptr() for x in (*parts.model.parameters(), *parts.model.buffers())}
        arguments = {x.untyped_storage().data_ptr(): at for at, x in reversed(list(enumerate(self._arguments)))}
        seen |= {pointer for pointer, at in arguments.items() if at in self.counted}
        if self.boundary_counted:  # the block before kept what it put out
            seen.add(hidden.untyped_storage().data_ptr())
        alive: list[object] = []

        def pack(tensor: torch.Tensor) -> None:
            storage = tensor.untyped_storage()
            pointer = storage.data_ptr()
            if pointer not in seen:
                seen.add(pointer)
                self.kept_bytes += storage.nbytes()
                alive.append(storage)  # a freed storage's address may be used again
                if pointer in arguments:
                    self.counted.append(arguments[pointer])

        hidden.requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):  # there is no backward pass
            output = run()
        self.boundary_counted = output.untyped_storage().data_ptr() in seen
        return output.detach()


def _total(output: Any) -> torch.Tensor:
    return torch.stack([tensor.sum() for tensor in output_tensors(output)]).sum()
