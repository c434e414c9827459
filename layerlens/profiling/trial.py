"""Which rows of an activation are of which sample: tried on two samples before anything is measured.

Where the samples are is found out for every module, not assumed (``layouts``): the model is run on two samples, and on
the same two exchanged. Activations that are the same for all samples (queries of a decoder that are learned) show
nothing then; for these the axis counts that is longer with a third sample. So it does in models that draw numbers
(ViTMAE its masks), where the same samples do not give the same again.

Some modules see one row for all samples ([1, ...]: tables of positions), which a tap expands to the batch. The expanded
rows must not change what the model computes. Where they do (DeBERTa repeats its projected positions itself), samples
are measured one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from layerlens.integrations.attention import attention_outputs
from layerlens.integrations.expert_products import of_interface
from layerlens.integrations.torch_modules import first_input
from layerlens.integrations.weight_matrices import is_convolution
from layerlens.models import ModelSpec
from layerlens.models.model_spec import ATTENTION, EXPERTS
from layerlens.profiling.layouts import Layout, changes, counted_layout, exchanged_layout, rows_of
from layerlens.profiling.own_hooks import changed_by_hooks
from layerlens.profiling.taps import IN_FRONT, Taps
from layerlens.tasks import Batch
from layerlens.tasks.losses import output_tensors

if TYPE_CHECKING:
    from layerlens.profiling.capture import Capture

TOLERANCE = 2e-2
"""Largest relative difference of two activations that are the same: batches are added up in other orders (bfloat16 has
three digits, but whole activations are compared, not single numbers)."""
UNKNOWN = "gets the tokens of all samples in one sequence, and they cannot be traced to samples"
SHARED = "is called once for all samples of a batch, so its rows cannot be traced to samples"


@dataclass(frozen=True)
class Trial:
    """What two samples have shown.

    Args:
        layouts: where the samples are in what a module gets; None where nobody asks.
        unmeasured: layers and modules if it is not known, with the reason.
        expanded: modules whose [1, ...] outputs the model does not take expanded to the batch.
    """

    layouts: Mapping[str, Layout] | None = None
    unmeasured: dict[str, str] = field(default_factory=dict)
    expanded: tuple[str, ...] = ()

    def apply_to(self, capture: Capture, *, sharded: bool) -> bool:
        """Tell the taps; whether samples must be measured one by one.

        Over several processes a model makes its passes batch by batch, so there the modules are left out instead.
        """
        capture.layouts = self.layouts
        for name, reason in self.unmeasured.items():
            capture.leave_out_module(name, reason)
        for name in self.expanded if sharded else ():
            capture.leave_out_module(name, "is called on one row for all samples, which cannot be separated in a model "
                                     "sharded over processes")  # fmt: skip
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
        return Trial({})  # inputs without an axis of samples: nothing can be exchanged

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
    attentions = {layer.name: layer.module for layer in spec.layers if layer.layer_type == ATTENTION}
    seen = _Seen(model, list(dict.fromkeys([*layers, *other_modules])), attentions, run)
    plain, first = seen.run(pair)
    _, second = seen.run(pair[::-1])
    n = 2 * rows
    hooked = changed_by_hooks(model, layers, lambda: run(pair))
    layouts, unmeasured, unclear = {}, dict(hooked), []
    for name, calls in first.items():
        if name in hooked:
            continue
        again = second.get(name, [])
        if len(calls) == len(again) and not any(_changed(one, two) for one, two in zip(calls, again, strict=True)):
            unclear.append(name)
        elif layout := _layout(model, name, calls, again):
            layouts[name] = layout
        else:
            unmeasured[name] = UNKNOWN
    drawn = _drawn(seen, {name: first[name] for name in unmeasured if name not in hooked}, pair)
    for name, found in _counted(seen, {name: first[name] for name in (*unclear, *drawn)}, pair, n, drawn).items():
        unmeasured.pop(name, None)
        if isinstance(found, Layout):
            layouts[name] = found
        else:
            unmeasured[name] = found
    for name, path in experts.items():
        if path in unmeasured or layouts.get(path, IN_FRONT) != IN_FRONT:
            unmeasured[name] = UNKNOWN
    unmeasured = {name: reason for name, reason in unmeasured.items() if name not in experts.values()}
    shared = tuple(
        name
        for name, calls in first.items()
        if name not in attentions and layouts.get(name, IN_FRONT).axis == 0 and any(call.one_row for call in calls)
    )
    taps = Taps(model, spec, other_modules, backward=True)
    taps.layouts = layouts
    taps.expect(n)
    expanded = shared if shared and not _same_when_expanded(taps, run, pair, plain) else ()
    return Trial(layouts, unmeasured, expanded)


@dataclass(frozen=True)
class _Call:
    """What a module gets in one call: few features of every row, and whether it puts out one row for all samples."""

    rows: torch.Tensor
    half: bool
    one_row: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.rows.shape[:-1])


def _changed(one: _Call, two: _Call) -> bool:
    return one.shape != two.shape or changes(one.rows, two.rows, half=one.half)


def _layout(model: torch.nn.Module, name: str, first: Sequence[_Call], second: Sequence[_Call]) -> Layout | None:
    """Where the exchange of two samples has shown them."""
    module = model.get_submodule(name)
    leading = 1 if is_convolution(module) or not _has_weight(module) else None  # images, and heads of attention
    half = any(call.half for call in first)
    return exchanged_layout([call.rows for call in first], [call.rows for call in second], leading, half=half)


def _has_weight(module: torch.nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), torch.Tensor)


def _drawn(seen: _Seen, unknown: Mapping[str, Sequence[_Call]], pair: tuple[int, int]) -> list[str]:
    """Those of the modules that get something else when the same is done again: the model draws numbers (masks, noise),
    so that an exchange shows nothing.
    """
    if not unknown:
        return []
    _, again = seen.run(pair)
    return [
        name
        for name, calls in unknown.items()
        if len(calls) == len(again.get(name, []))
        and any(_changed(one, two) for one, two in zip(calls, again[name], strict=True))
    ]


def _counted(
    seen: _Seen, unclear: Mapping[str, Sequence[_Call]], pair: tuple[int, int], n: int, drawn: Sequence[str]
) -> dict[str, Layout | str]:
    """The layout of what is the same for all samples, or drawn, by what a third sample adds to; or why not."""
    one_row = {name for name, calls in unclear.items() if all(call.shape[:1] == (1,) for call in calls)}
    found: dict[str, Layout | str] = {name: IN_FRONT for name in unclear if name in one_row}
    if len(found) == len(unclear):
        return found
    try:
        _, three = seen.run((*pair, pair[0]))
    except (RuntimeError, ValueError, IndexError):  # a model that takes pairs alone
        three = {}
    for name, calls in unclear.items():
        if name in found:
            continue
        two, again = [call.shape for call in calls], [call.shape for call in three.get(name, [])]
        layout = counted_layout(two, again, n)
        if layout and (name in drawn or all(_of_all_samples(layout, call) for call in calls)):
            found[name] = layout
        else:
            found[name] = SHARED if two == again else UNKNOWN
    return found


def _of_all_samples(layout: Layout, call: _Call) -> bool:
    """Whether both samples have the same there; else it is sorted, and the rows are where their values put them."""
    one, other = layout.in_front(call.rows, 2)
    return not changes(one, other, half=call.half)


class _Seen:
    """Forward passes of a model, and what some of its modules get in them."""

    def __init__(self, model: torch.nn.Module, names: Sequence[str], attentions: Mapping[str, str], run: Run) -> None:
        self.model = model
        self.names = names
        self.attentions = {id(model.get_submodule(path)): name for name, path in attentions.items()}
        self.forward = run

    def run(self, order: Sequence[int]) -> tuple[list[torch.Tensor], dict[str, list[_Call]]]:
        """The outputs, and every call of a module by its name."""
        calls: dict[str, list[_Call]] = {}

        def hook_of(name: str, module: torch.nn.Module) -> Any:
            lookup, image = isinstance(module, torch.nn.Embedding), is_convolution(module)

            def hook(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                features = None if lookup else 1 if image else -1
                calls.setdefault(name, []).append(_call(first_input(args, kwargs), features, output))

            return hook

        def on_attention(module: torch.nn.Module, query: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
            if name := self.attentions.get(id(module)):
                calls.setdefault(name, []).append(_call(query, -1, None))
            return output

        with ExitStack() as stack:
            for name in self.names:
                module = self.model.get_submodule(name)
                stack.callback(module.register_forward_hook(hook_of(name, module), with_kwargs=True).remove)
            if self.attentions:
                stack.enter_context(attention_outputs(self.model, on_attention))
            stack.enter_context(torch.no_grad())
            return list(self.forward(order)), calls


def _call(given: torch.Tensor, features: int | None, output: Any) -> _Call:
    half = given.is_floating_point() and given.element_size() < 4
    one_row = isinstance(output, torch.Tensor) and output.dim() > 1 and len(output) == 1
    return _Call(rows_of(given, features), half, one_row)


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
