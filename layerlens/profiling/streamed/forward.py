"""Blocks one after the other, each for all batches, forward: what a profile and the fit of a head both begin with.

What a step of the frozen model keeps and computes (``footprint.frozen_footprint``) is counted on the way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from layerlens.integrations.flops import plain_counter
from layerlens.profiling.footprint import samples_in
from layerlens.profiling.streamed.on_disk import Boundaries, TreeFile
from layerlens.profiling.streamed.parts import (
    PLAIN_ANSWERS,
    BlockCall,
    FrontOutput,
    ModelParts,
    cannot_stream,
    refuse_non_finite_activations,
)
from layerlens.profiling.streamed.residency import Residency, Weights
from layerlens.tasks import Batch
from layerlens.tasks.batches import MASKS
from layerlens.tasks.losses import output_tensors
from layerlens.utils.progress import Advance

log = logging.getLogger(__name__)


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
        with plain_counter() as counter:
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
        with torch.no_grad(), plain_counter() as counter:
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


@dataclass(frozen=True)
class Outline:
    """What must be known of a batch when its blocks run: not its inputs, which are made anew for the tail.

    Args:
        index: int64 [b], positions of its samples in the calibration set.
        masks: where its masks are stored.
        calls: for each block, where the arguments beside its activations are.
        shapes: of the front's outputs.
        rows: of the model's batch for each sample.
    """

    index: torch.Tensor
    masks: dict[str, Any]
    calls: list[Any]
    shapes: dict[str, Any]
    rows: int = 1


class ForwardSweep:
    """The activations before every block and after the last one, of all batches, kept in files.

    Args:
        model: on the meta device, in evaluation mode.
        weights: where its weights are.
        batches: made anew each time they are asked for.
        directory: for the files.
        device: where the blocks run.
        footprint: counts what a step of the model keeps, on a batch of its own; None where nobody asks.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        weights: Weights,
        batches: Sequence[Batch],
        directory: Path,
        device: torch.device,
        footprint: StreamedFootprint | None = None,
    ) -> None:
        self.model = model
        self.batches = batches
        self.device = device
        self.footprint = footprint
        self.parts = ModelParts(model)
        self.residency = Residency(model, weights, device)
        self.boundaries = Boundaries(directory / "boundaries.bin", self.n_blocks, device)
        self.arguments = TreeFile(directory / "arguments.bin", device)
        self.outlines: list[Outline] = []
        self.loose = self.residency.loose_names([*self.parts.units, *self.parts.blocks])

    @property
    def n_blocks(self) -> int:
        """Blocks of the model."""
        return len(self.parts.blocks)

    def batch(self, number: int) -> Batch:
        """A batch on the device."""
        return self.batches[number].to(self.device)

    def block_names(self, number: int) -> tuple[str, ...]:
        """Weights of one block."""
        return self.residency.names_in([self.parts.blocks[number]])

    def front_names(self) -> tuple[str, ...]:
        """Weights of the front."""
        return (*self.residency.names_in(self.parts.front), *self.loose)

    def tail_names(self) -> tuple[str, ...]:
        """Weights of the tail."""
        return (*self.residency.names_in(self.parts.tail), *self.loose)

    def run_front(self, told: Callable[[Batch], object], advance: Advance) -> None:
        """The first block's activations of every batch; ``told`` gets every batch.

        Raises:
            OutputError: the disk has no room for the activations of all blocks.
        """
        residency = self.residency
        residency.only(self.loose)
        with residency.reads() as read:  # DeBERTa reads its table of positions without calling the module
            self.parts.discover(self.batch(0).inputs, lambda paths: residency.hold(residency.names_in(paths)))
        self.loose = (*self.loose, *sorted(read - set(self.loose)))
        residency.only(self.front_names())
        residency.read_ahead(self.block_names(0))
        with torch.no_grad():
            for number in range(len(self.batches)):
                batch = self.batch(number)
                told(batch)
                self._keep(batch, self.parts.run_front(batch.inputs))
                advance(1)
            if self.footprint is not None:
                self.boundaries.append(self.footprint.run_front(self.parts, self.device))
        self.boundaries.make_room()
        log.info(
            "streaming %d blocks: %.3g GB of activations at block boundaries and %.3g GB of block arguments in %s",
            self.n_blocks, 1e-9 * self.boundaries.total_bytes, 1e-9 * self.arguments.file.end,
            self.boundaries.file.path.parent,
        )  # fmt: skip

    def run_forward(self, done: int, after_block: Callable[[int], object], advance: Advance) -> None:
        """All blocks from number ``done`` on; ``after_block`` is called with the number of finished blocks."""
        for number in range(done, self.n_blocks):
            self.residency.only(self.block_names(number))
            following = self.block_names(number + 1) if number + 1 < self.n_blocks else self.tail_names()
            self.residency.read_ahead(following)
            with torch.no_grad():
                for batch in range(len(self.batches)):
                    hidden = self.boundaries.read(number, batch)
                    output = self.parts.run_block(number, hidden, self.call(batch, number))
                    if batch == 0:
                        where = f"what {self.parts.blocks[number]} puts out"
                        sample = int(self.outlines[0].index[0])
                        refuse_non_finite_activations(self.model, output[:1], where, sample)
                    self.boundaries.write(number + 1, batch, output)
                    advance(1)
            if self.footprint is not None:
                dense = len(self.batches)
                output = self.footprint.run_block(self.parts, number, self.boundaries.read(number, dense))
                self.boundaries.write(number + 1, dense, output)
            after_block(number + 1)

    def call(self, batch: int, block: int) -> BlockCall:
        """What a block is given beside the activations of a batch."""
        args, kwargs, by_name = self.arguments.read(self.outlines[batch].calls[block])
        return BlockCall(tuple(args), kwargs, by_name)

    def outline_batch(self, number: int) -> Batch:
        """A batch without its inputs and targets: with its masks and the positions of its samples."""
        outline = self.outlines[number]
        return Batch(self.arguments.read(outline.masks), None, outline.index, outline.rows)

    def _keep(self, batch: Batch, found: FrontOutput) -> None:
        self.boundaries.append(found.hidden)
        check_arguments(self.model, found.calls)
        masks = {name: batch.inputs[name] for name in MASKS if name in batch.inputs}
        distinct: dict[tuple[Any, ...], int] = {}  # blocks are mostly given the very same
        trees: list[tuple[Any, ...]] = []
        which: list[int] = []
        for call in found.calls:
            key = (*(_identity(x) for x in call.args), *((k, _identity(x)) for k, x in call.kwargs.items()))
            if key not in distinct:
                distinct[key] = len(trees)
                trees.append((call.args, call.kwargs, call.by_name))
            which.append(distinct[key])
        stored = self.arguments.append({"masks": masks, "calls": trees})
        calls = [stored["calls"][number] for number in which]
        self.outlines.append(Outline(batch.index, stored["masks"], calls, found.shapes, batch.rows))


def check_arguments(model: torch.nn.Module, calls: Sequence[BlockCall]) -> None:
    """Refuse blocks that are given what cannot be kept in a file, or what gradients flow through."""
    for call in calls:
        for leaf in torch.utils._pytree.tree_leaves((call.args, call.kwargs)):
            if isinstance(leaf, torch.Tensor):
                if leaf.requires_grad:
                    raise cannot_stream(model, "has gradients that reach its front past the activations")
            elif not isinstance(leaf, PLAIN_ANSWERS):
                raise cannot_stream(model, f"gives its blocks a {type(leaf).__name__}")


def _identity(x: Any) -> Any:
    """Two arguments with the same identity are the same."""
    if isinstance(x, torch.Tensor):
        return id(x)
    if isinstance(x, (tuple, list)):
        return tuple(_identity(part) for part in x)
    if isinstance(x, dict):
        return tuple((key, _identity(part)) for key, part in x.items())
    return (type(x), x)


def _total(output: Any) -> torch.Tensor:
    return torch.stack([tensor.sum() for tensor in output_tensors(output)]).sum()
