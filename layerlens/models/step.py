"""What a training step of a frozen model does, and for the sake of which layers: recorded once, for any choice.

The backward pass keeps a tensor, or runs an operation, because some layer below it is adapted. The set of these layers
is its *cause*: as soon as any one of them is adapted, it is paid for, and it is paid for once. So what a step costs is
a function of the set of adapted layers, and the record has all of it.

Its times, at which something is alive, are the operations of the forward pass: the backward pass goes through them
from the last to the first.

Axes: b the recorded batch sizes, c causes, l layers, f operations of the forward pass, k operations of the backward
pass, s storages, g calls of blocks that can be checkpointed, t times. Figures of operations are FLOPs, bytes that are
read or written, and bytes of large new blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

MATMUL, ATTENTION, RANDOM, NORM, SAFE_SOFTMAX, CURVE, STRIDED, MEMORY, VIEW, SLOPE = (
    "matmul", "attention", "random", "norm", "safe_softmax", "curve", "strided", "memory", "view", "slope",
)  # fmt: skip
KINDS = (MATMUL, ATTENTION, RANDOM, NORM, SAFE_SOFTMAX, CURVE, STRIDED, MEMORY, VIEW, SLOPE)
"""Matrix products; fused attention; random numbers (dropout); normalisations of rows (softmax, layer norm); the softmax
of attention that is not fused, which looks for rows that are masked whole; functions of every element (GELU, tanh);
copies between layouts; operations that only move elements; those that move nothing; and slopes of functions of every
element (the backward pass of GELU), which take two to three times as long as the functions."""

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
class StepRecord:
    """One recorded step.

    Args:
        layers: names of the layers, in the order of the axis l.
        batch_sizes: samples of each recording, ascending; all figures are taken to be linear in the samples.
        sequence_length: tokens of the samples; 0 where they are no tokens.
        cause__cl: bool [c, l + 1], the layers of each cause. The last column is what trains in every choice (a task
            head): a cause with it is paid for by every choice.
        forward_kind: int8 [f], places in ``KINDS``.
        forward__bfx: float64 [b, f, 3].
        backward_kind: int8 [k].
        backward_cause: int32 [k].
        backward__bkx: float64 [b, k, 3].
        storage_cause: int32 [s]; -1 for what the frozen model never keeps.
        storage__bs: float64 [b, s], bytes.
        read__ns: int32 [n, 3], (layer, side, storage) of all calls; sides are 0 for its input, 1 for its output, 2 for
            its queries and 3 for what its options change.
        element_bytes: int32 [l, 3], of one element of the layer's input, output and queries; 0: not seen as a whole.
        forward_peak__b: float64 [b], the most bytes alive at one time of a forward pass that keeps nothing.
        alive__bf: float64 [b, f], bytes alive at each operation of a forward pass that keeps nothing.
        held__bf: float64 [b, f], bytes of gradients alive when the backward pass comes to the operation, where
            everything is adapted.
        passing__bf: float64 [b, f], the most bytes that its backward pass has alive beside them.
        step_cause: int32 [f], the cause of its backward pass; -1: it has none.
        storage_span__st: int32 [s, 3], the operation that makes it, the first at which a forward pass without gradients
            has let it go, and the lowest whose backward pass reads it.
        layer_span__lt: int32 [l, 2], the first operation of the layer and the one after its last.
        block_call__g: int32 [g], places in ``blocks``: a block that is called twice has two.
        block_span__gt: int32 [g, 3], the first operation of the call, the one after its last, and the one after the
            last that is computed again where the block is checkpointed (what comes after keeps nothing of its own).
        block_input__ns: int32 [n, 2], (call, storage) of all that goes into a block.
        around__bf: float64 [b, f], bytes alive at each operation of a block that were there before the block began.
        blocks: names of the modules that can be checkpointed.
        head_tensors, head_elements: of the parameters that train in every choice.
        uncounted: operation -> why the memory that it has for itself while it runs is not counted.
        rates: measured rates of the device that it is for (``cost.device``), as JSON values; None where not measured.
    """

    layers: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    sequence_length: int
    cause__cl: np.ndarray
    forward_kind: np.ndarray
    forward__bfx: np.ndarray
    backward_kind: np.ndarray
    backward_cause: np.ndarray
    backward__bkx: np.ndarray
    storage_cause: np.ndarray
    storage__bs: np.ndarray
    read__ns: np.ndarray
    element_bytes: np.ndarray
    forward_peak__b: np.ndarray
    alive__bf: np.ndarray
    held__bf: np.ndarray
    passing__bf: np.ndarray
    step_cause: np.ndarray
    storage_span__st: np.ndarray
    layer_span__lt: np.ndarray
    block_call__g: np.ndarray
    block_span__gt: np.ndarray
    block_input__ns: np.ndarray
    around__bf: np.ndarray
    blocks: tuple[str, ...] = ()
    head_tensors: int = 0
    head_elements: int = 0
    uncounted: dict[str, str] = field(default_factory=dict)
    rates: dict[str, Any] | None = None

    def at(self, name: str, samples: float) -> np.ndarray:
        """A field with the axis b, for so many samples: on the line through the recordings, never below 0."""
        values = np.asarray(getattr(self, name), dtype=np.float64)
        if len(self.batch_sizes) == 1:
            return np.asarray(values[0] * (samples / self.batch_sizes[0]))
        low, high = self.batch_sizes[0], self.batch_sizes[-1]
        share = (samples - low) / (high - low)
        return np.asarray(np.maximum(0.0, values[0] + share * (values[-1] - values[0])))

    def arrays(self) -> dict[str, np.ndarray]:
        """Its arrays by name."""
        return {name: getattr(self, name) for name in self.array_names()}

    def numbers(self) -> dict[str, Any]:
        """Everything else, as JSON values."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in _DTYPES}

    @staticmethod
    def array_names() -> tuple[str, ...]:
        """Names of its arrays."""
        return tuple(_DTYPES)

    @classmethod
    def of(cls, numbers: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> StepRecord:
        """From ``numbers`` and ``arrays``, which may all be float64.

        Raises:
            ValueError, TypeError: they do not belong together.
        """
        lists = {name: tuple(numbers[name]) for name in ("layers", "batch_sizes", "blocks")}
        typed = {name: np.asarray(arrays[name]).astype(dtype) for name, dtype in _DTYPES.items()}
        record = cls(**{**numbers, **lists, **typed})
        record.check()
        return record

    @property
    def value_bytes(self) -> int:
        """Bytes of a value that trains, and of what is computed from it: PEFT's layers compute in float32 or wider."""
        return max(4, int(self.element_bytes.max(initial=0)))

    @property
    def memory_source(self) -> str:
        """What memory is predicted from, in words."""
        names = ", ".join(sorted(self.uncounted))
        missing = f", without what {names} takes while it runs" if names else ""
        return (
            f"a recorded training step: weights, activations kept for this choice, workspace, optimiser state{missing}"
        )

    def check(self) -> None:
        """Raise ValueError where lengths or places do not fit together."""
        sizes = {"b": len(self.batch_sizes), "c": len(self.cause__cl), "l": len(self.layers)}
        for name, axes in _AXES.items():
            shape = getattr(self, name).shape
            wrong = len(shape) != len(axes) or any(
                (int(axis) if axis.isdigit() else sizes.setdefault(axis, length)) != length
                for axis, length in zip(axes, shape, strict=True)
            )
            if wrong:
                raise ValueError(f"step: {name} has shape {shape}")
        if self.cause__cl.shape[1] != len(self.layers) + 1 or not self.batch_sizes:
            raise ValueError("step: causes do not fit the layers")
        for name, low, high in (
            ("forward_kind", 0, len(KINDS)), ("backward_kind", 0, len(KINDS)), ("backward_cause", 0, sizes["c"]),
            ("storage_cause", -1, sizes["c"]), ("step_cause", -1, sizes["c"]), ("storage_span__st", 0, sizes["f"] + 1),
            ("layer_span__lt", 0, sizes["f"] + 1), ("block_call__g", 0, len(self.blocks)),
            ("block_span__gt", 0, sizes["f"] + 1),
        ):  # fmt: skip
            values = getattr(self, name)
            if values.size and (values.min() < low or values.max() >= high):
                raise ValueError(f"step: {name} is out of range")
        read = self.read__ns
        if read.size and ((read < 0).any() or (read >= (sizes["l"], 4, sizes["s"])).any()):
            raise ValueError("step: read__ns is out of range")
        inputs = self.block_input__ns
        if inputs.size and ((inputs < 0).any() or (inputs >= (sizes["g"], sizes["s"])).any()):
            raise ValueError("step: block_input__ns is out of range")


_DTYPES: dict[str, Any] = {
    "cause__cl": bool, "forward_kind": np.int8, "forward__bfx": np.float64, "backward_kind": np.int8,
    "backward_cause": np.int32, "backward__bkx": np.float64, "storage_cause": np.int32, "storage__bs": np.float64,
    "read__ns": np.int32, "element_bytes": np.int32, "forward_peak__b": np.float64, "alive__bf": np.float64,
    "held__bf": np.float64, "passing__bf": np.float64, "step_cause": np.int32, "storage_span__st": np.int32,
    "layer_span__lt": np.int32, "block_call__g": np.int32, "block_span__gt": np.int32, "block_input__ns": np.int32,
    "around__bf": np.float64,
}  # fmt: skip
_AXES = {
    "forward_kind": "f", "forward__bfx": "bf3", "backward_kind": "k", "backward_cause": "k", "backward__bkx": "bk3",
    "storage_cause": "s", "storage__bs": "bs", "read__ns": "n3", "element_bytes": "l3", "forward_peak__b": "b",
    "alive__bf": "bf", "held__bf": "bf", "passing__bf": "bf", "step_cause": "f", "storage_span__st": "s3",
    "layer_span__lt": "l2", "block_call__g": "g", "block_span__gt": "g3", "block_input__ns": "i2", "around__bf": "bf",
}  # fmt: skip
"""Axes by letters; digits are lengths."""
