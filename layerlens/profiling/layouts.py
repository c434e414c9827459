"""Where the samples of a batch are in an activation, found out by exchanging two of them.

Most modules see [samples, ..., features]. Others see [tokens, samples, features] (PyTorch's own transformers, DETR),
the windows of all images one after the other ([samples · windows, ...]: Swin, SAM, Hiera), or all tokens of a batch in
one axis, sample by sample (OPT) or position by position (FSMT). Shapes alone do not tell these apart, so values do:
where the samples of a batch change places, the rows of the activation must, and nothing else may change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from layerlens.exceptions import ProfilingError

N_FEATURES = 2
"""Features that are kept of every row: random sums of its own, which are alike where the rows are."""
FLOOR, FLOOR_HALF = 1e-4, 6e-2
"""Smallest relative change of an activation that the exchange of two samples is said to make, in float32 and in half
precision: sums over a batch are added up in other orders, which moves float32 by some 1e-6, and bfloat16, which has
three digits, by up to 2e-2."""
SHARE, SHARE_HALF = 0.1, 0.5
"""Largest part of that change that may be left after the exchange is undone. Where samples are in another axis, what is
left is about as large as the change, or larger: it is there at all rows that are moved wrongly. Where they are here, it
is rounding, which is a hundredth of the smallest change in float32 and a third of it in bfloat16."""
Rows = torch.Tensor
"""[..., 2]: an activation with few features."""


@dataclass(frozen=True)
class Layout:
    """The axis that samples are in.

    Args:
        axis: which.
        minor: whether neighbours there are of different samples (place · n + sample); else those of a sample are
            together (sample · places + place).
    """

    axis: int = 0
    minor: bool = False

    def in_front(self, tensor: torch.Tensor, n: int) -> torch.Tensor:
        """The same numbers, [n, ...].

        Raises:
            ProfilingError: the axis is no multiple of n.
        """
        if tensor.dim() <= self.axis or tensor.shape[self.axis] % n:
            raise ProfilingError(
                f"gets activations {list(tensor.shape)} of {n} samples, and its rows cannot be traced to samples"
            )
        if tensor.shape[self.axis] == n:
            return tensor.movedim(self.axis, 0)
        parts = tensor.unflatten(self.axis, (-1, n) if self.minor else (n, -1))
        return parts.movedim(self.axis + self.minor, 0)


def rows_of(tensor: torch.Tensor, features: int | None) -> Rows:
    """An activation with few features, last, on its own device.

    Args:
        tensor: an activation, or indices of rows that are looked up.
        features: its axis of features; None for indices.
    """
    if features is None:
        angle = tensor.detach().double() * 2.399963  # no two indices below some thousands are alike
        return torch.stack((angle.sin(), angle.cos()), dim=-1)
    last = tensor.detach().movedim(features, -1)
    wide = last.to(torch.promote_types(last.dtype, torch.float32))
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(wide.shape[-1], N_FEATURES, generator=generator).to(wide)
    return wide @ random


def exchanged_layout(
    first: Sequence[Rows], second: Sequence[Rows], axes: int | None = None, *, half: bool = False
) -> Layout | None:
    """The layout that two passes of two samples show, the second with these exchanged; None where it is not one.

    Args:
        first, second: what a module gets in every call, of both passes.
        axes: how many leading axes samples may be in; all but the features by default.
        half: whether the activations are of half precision.
    """
    if len(first) != len(second) or any(one.shape != other.shape for one, other in zip(first, second, strict=True)):
        return None
    pairs = [pair for pair in zip(first, second, strict=True) if changes(*pair, half=half)]
    if not pairs:
        return None
    least = min(one.dim() for one, _ in pairs) - 1
    fitting = [
        Layout(axis, minor)
        for axis in range(least if axes is None else min(axes, least))
        for minor in (False, True)
        if all(_exchanges(Layout(axis, minor), *pair, half=half) for pair in pairs)
    ]
    if len(fitting) == 2 and fitting[0].axis == fitting[1].axis:  # two rows: both orders are the same
        same = all(one.shape[fitting[0].axis] == 2 for one, _ in pairs)
        return fitting[0] if same else None
    return fitting[0] if len(fitting) == 1 else None


def counted_layout(two: Sequence[Sequence[int]], three: Sequence[Sequence[int]], n: int) -> Layout | None:
    """The one axis that has a row for each of the samples, in passes of two and of three; None where there is none.

    For activations that are the same for all samples, where an exchange shows nothing.

    Args:
        two, three: shapes without features, call by call.
        n: rows of the model's batch that two samples have.
    """
    if len(two) != len(three) or any(len(a) != len(b) for a, b in zip(two, three, strict=True)):
        return None
    of_calls = [
        {axis for axis, (a, b) in enumerate(zip(one, other, strict=True)) if (a, b) == (n, n * 3 // 2)}
        for one, other in zip(two, three, strict=True)
    ]
    common = set.intersection(*of_calls) if of_calls else set()
    return Layout(common.pop()) if len(common) == 1 else None


def changes(one: Rows, other: Rows, *, half: bool = False) -> bool:
    """Whether the exchange has changed the activation."""
    return _distance(one, other) > (FLOOR_HALF if half else FLOOR) * float(one.double().norm())


def _exchanges(layout: Layout, one: Rows, other: Rows, *, half: bool) -> bool:
    """Whether the second pass has the samples of the first, exchanged."""
    if one.shape[layout.axis] % 2:
        return False
    left = _distance(layout.in_front(one, 2).flip(0), layout.in_front(other, 2))
    return left <= (SHARE_HALF if half else SHARE) * _distance(one, other)


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).double().norm())  # squares of 1e-23 are 0 in float32
