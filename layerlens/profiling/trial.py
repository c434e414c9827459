"""Which rows of an activation are of which sample: tried on two samples before anything is measured.

Taps take it that activations are [samples, ..., features]. Some modules see others: all tokens of a batch one after
the other ([samples · tokens, features]: OPT's feed-forward layers, gates of shared experts, windows of an image), or
one row for all samples ([1, ...]: tables of positions), which a tap expands to the batch. Whether either is right is
found out, not assumed: exchanging two samples must exchange two halves of the rows; and the expanded rows must not
change what the model computes. Where they do (DeBERTa repeats its projected positions itself), samples are measured
one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from layerlens.integrations.expert_products import of_interface
from layerlens.models import ModelSpec
from layerlens.models.model_spec import ATTENTION, EXPERTS
from layerlens.profiling.taps import Taps
from layerlens.tasks import Batch
from layerlens.tasks.losses import output_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from layerlens.profiling.capture import Capture

TOLERANCE = 2e-2
"""Largest relative difference of two activations that are the same: batches are added up in other orders (bfloat16 has
three digits, but whole activations are compared, not single numbers)."""
UNKNOWN = "gets the tokens of all samples one after the other, and which is of which sample is not known"


@dataclass(frozen=True)
class Trial:
    """What two samples have shown.

    Args:
        traced: modules whose rows are known to be of the sample at their place; None where nobody asks.
        unmeasured: layers and modules whose rows are not, with the reason.
        expanded: modules whose [1, ...] outputs the model does not take expanded to the batch.
    """

    traced: frozenset[str] | None = None
    unmeasured: dict[str, str] = field(default_factory=dict)
    expanded: tuple[str, ...] = ()

    def apply_to(self, capture: Capture, *, sharded: bool) -> bool:
        """Tell the taps; whether samples have to be measured one by one.

        Over several processes a model makes its passes batch by batch, so there the modules are left out instead.
        """
        capture.traced = self.traced
        for name, reason in self.unmeasured.items():
            capture.leave_out_module(name, reason)
        for name in self.expanded if sharded else ():
            capture.leave_out_module(name, "is called on one row for all samples, which a model that is spread over "
                                     "processes cannot tell apart")  # fmt: skip
        return bool(self.expanded) and not sharded


Run = Callable[[Sequence[int]], Sequence[torch.Tensor]]
"""Places of two samples, in an order -> the outputs of a model, or of a part of it, for them."""


def tried(model: torch.nn.Module, spec: ModelSpec, other_modules: Sequence[str], batches: Sequence[Batch]) -> Trial:
    """Run the model on two samples of the first batch that has two; not where all have one.

    Args:
        model: frozen, in evaluation mode.
        spec, other_modules: see ``Taps``.
        batches: the calibration data.
    """
    batch = next((one for one in batches if len(one.index) > 1), None)
    if batch is None:
        return Trial()
    rows = len(batch.index) * batch.rows
    if any(not isinstance(x, torch.Tensor) or x.dim() < 1 or len(x) != rows for x in batch.inputs.values()):
        return Trial(frozenset())  # inputs without an axis of samples: nothing can be exchanged

    def run(order: Sequence[int]) -> list[torch.Tensor]:
        return list(output_tensors(model(**batch.taken(torch.tensor(list(order))).inputs)))

    return tried_on(model, spec, other_modules, run, (0, len(batch.index) - 1), batch.rows)


def tried_on(
    model: torch.nn.Module, spec: ModelSpec, other_modules: Sequence[str], run: Run, pair: tuple[int, int], rows: int
) -> Trial:
    """What two samples show of the modules that ``run`` calls.

    Args:
        model, spec, other_modules: see ``Taps``.
        run: of the model or of a part of it.
        pair: places of the two samples.
        rows: of the model's batch for each sample.
    """
    experts = {layer.name: layer.module for layer in spec.layers if layer.layer_type == EXPERTS}
    layers = [layer.name for layer in spec.layers if layer.layer_type not in (ATTENTION, EXPERTS)]
    layers += [path for path in experts.values() if of_interface(model.get_submodule(path))]
    seen = _Seen(model, dict.fromkeys([*layers, *other_modules]), run)
    plain = seen.run(pair)
    n = 2 * rows
    odd = [name for name, calls in seen.shapes.items() if any(inputs[0] not in (1, n) for inputs, _ in calls)]
    traced = set(seen.shapes) - set(odd)
    unmeasured = {}
    if odd:
        first, second = seen.inputs_of(odd, pair), seen.inputs_of(odd, pair[::-1])
        for name in odd:
            if _exchanged(first[name], second[name]):
                traced.add(name)
            else:
                unmeasured[name] = UNKNOWN
    unmeasured |= {name: UNKNOWN for name, path in experts.items() if path in unmeasured}
    unmeasured = {name: reason for name, reason in unmeasured.items() if name not in experts.values()}
    shared = tuple(name for name, calls in seen.shapes.items() if any(output[0] == 1 for _, output in calls))
    taps = Taps(model, spec, other_modules, backward=True)
    taps.expect(n)
    expanded = shared if shared and not _same_when_expanded(taps, run, pair, plain) else ()
    return Trial(frozenset(traced), unmeasured, expanded)


class _Seen:
    """Forward passes of a model, and what some of its modules get in them."""

    def __init__(self, model: torch.nn.Module, names: Any, run: Run) -> None:
        self.model = model
        self.names = list(names)
        self.forward = run
        self.shapes: dict[str, list[tuple[torch.Size, torch.Size]]] = {}

    def run(self, order: Sequence[int]) -> list[torch.Tensor]:
        """The outputs; the shapes of the modules' inputs and outputs are noted, call by call."""

        def note(name: str, args: Any, output: Any) -> None:
            self.shapes.setdefault(name, []).append((_size(args[0]), _size(output)))

        with self._hooks(self.names, note):
            return list(self.forward(order))

    def inputs_of(self, names: Sequence[str], order: Sequence[int]) -> dict[str, list[torch.Tensor]]:
        """The inputs of some modules, call by call."""
        found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        with self._hooks(names, lambda name, args, output: found[name].append(args[0].detach().float().clone())):
            self.forward(order)
        return found

    @contextmanager
    def _hooks(self, names: Sequence[str], note: Any) -> Iterator[None]:
        def hook_of(name: str) -> Any:
            return lambda module, args, output: note(name, args, output)

        handles = [self.model.get_submodule(name).register_forward_hook(hook_of(name)) for name in names]
        try:
            with torch.no_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()


def _size(tensor: Any) -> torch.Size:
    """The shape of a tensor that has two axes or more, else one that fits no batch."""
    return tensor.shape if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 else torch.Size([0])


def _exchanged(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> bool:
    """Whether the halves of the rows are exchanged in the second of two passes, in every call, and are not alike."""
    if len(first) != len(second) or not first:
        return False
    for one, other in zip(first, second, strict=True):
        if one.shape != other.shape or one.dim() < 2 or len(one) % 2:
            return False
        if not _alike(one.unflatten(0, (2, -1)).flip(0).flatten(0, 1), other) or _alike(one, other):
            return False
    return True


def _same_when_expanded(taps: Taps, run: Run, pair: Sequence[int], plain: Sequence[torch.Tensor]) -> bool:
    """Whether the model puts out the same when [1, ...] outputs of its modules are expanded to the batch."""
    try:
        with taps.open(), torch.enable_grad():
            tapped = [tensor.detach() for tensor in run(pair)]
    except (RuntimeError, ValueError, IndexError):
        return False
    return all(x.shape == y.shape and _alike(x.float(), y.float()) for x, y in zip(plain, tapped, strict=True))


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    scale = float(one.norm())
    return float((one - other).norm()) <= TOLERANCE * scale + 1e-12
