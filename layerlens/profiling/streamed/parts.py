"""A model cut into what is before its blocks, the blocks, and what is after them, by running its own ``forward``.

Blocks are replaced by functions while the rest runs. Modules of the front are replaced in turn while the tail runs:
they put out NaN, so that a tail that reads anything of the front but the activations cannot go unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_map

from layerlens.exceptions import ProfilingError
from layerlens.integrations.transformers import blocks_of

PLAIN_ANSWERS = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class BlockCall:
    """What a block is given beside its activations.

    Args:
        args: positional arguments after the activations.
        kwargs: arguments by name.
        by_name: the name that the activations are given by; "" where they come first.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    by_name: str = ""


@dataclass(frozen=True)
class FrontOutput:
    """What the front puts out for one batch.

    Args:
        hidden: the first block's activations.
        calls: what each block is given beside them.
        shapes: by module of the front, the shapes and types of its outputs.
    """

    hidden: torch.Tensor
    calls: list[BlockCall]
    shapes: dict[str, Any]


class _Arrived(Exception):
    """The last block was reached; the rest of the forward pass is not wanted."""


class ModelParts:
    """The front, the blocks and the tail of one model.

    Raises:
        ProfilingError: the model has no blocks.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.blocks = blocks_of(model)
        if not self.blocks:
            raise cannot_stream(model, "has no transformer blocks")
        self.units = tuple(_units(model, self.blocks))
        self.front: tuple[str, ...] = ()
        self._extras: tuple[Any, ...] | None = None  # of a block that puts out a tuple
        self._answers_known = False

    @property
    def tail(self) -> tuple[str, ...]:
        """Modules beside the blocks that the front does not call."""
        return tuple(unit for unit in self.units if unit not in self.front)

    def run_front(
        self,
        inputs: Mapping[str, Any],
        on_call: Callable[[str], object] = lambda unit: None,
        *,
        into_tail: bool = False,
    ) -> FrontOutput:
        """The model up to its first block.

        Args:
            inputs: of the model.
            on_call: called with every module outside the blocks before it runs.
            into_tail: go on behind the last block up to the first module there, to see that no block is called again.

        Raises:
            ProfilingError: the model does something between its blocks, or calls one of them twice.
        """
        hidden: list[torch.Tensor] = []
        calls: list[BlockCall] = []
        shapes: dict[str, Any] = {}

        def stub(number: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                given, call = _split(self.model, args, kwargs)
                if number != len(calls):
                    what = "calls a block twice" if number < len(calls) else "leaves out a block"
                    raise cannot_stream(self.model, f"{what} ({self.blocks[number]})")
                if number and given is not hidden[0]:
                    raise cannot_stream(
                        self.model, f"computes something between its blocks, before {self.blocks[number]}"
                    )
                hidden[:] = [given]
                calls.append(call)
                if not self._answers_known or (number == len(self.blocks) - 1 and not into_tail):
                    raise _Arrived
                return self._answer(given)

            return forward

        def told(unit: str) -> Callable[..., None]:
            def hook(module: Any, args: Any) -> None:
                if len(calls) == len(self.blocks):
                    raise _Arrived
                on_call(unit)

            return hook

        def seen(unit: str) -> Callable[..., None]:
            def hook(module: Any, args: Any, output: Any) -> None:
                shapes[unit] = tree_map(lambda x: (x.shape, x.dtype) if isinstance(x, torch.Tensor) else None, output)

            return hook

        with ExitStack() as stack:
            for unit in self.units:
                module = self.model.get_submodule(unit)
                stack.callback(module.register_forward_pre_hook(told(unit)).remove)
                stack.callback(module.register_forward_hook(seen(unit)).remove)
            stack.enter_context(self._replaced({path: stub(number) for number, path in enumerate(self.blocks)}))
            with suppress(_Arrived):
                self.model(**inputs)
        if calls:
            return FrontOutput(hidden[0], calls, shapes)
        raise cannot_stream(self.model, "does not call its blocks")

    def discover(self, inputs: Mapping[str, Any], load: Callable[[Sequence[str]], object]) -> None:
        """Find out which modules are the front, and what a block outputs; ``load`` gets the needed names.

        Raises:
            ProfilingError: see ``run_front``; or blocks put out more than activations.
        """
        called: list[str] = []

        def on_call(unit: str) -> None:
            if unit not in called:
                called.append(unit)
                load([unit])

        with torch.no_grad():
            found = self.run_front(inputs, on_call)
            self.front = tuple(called)
            load([self.blocks[0]])
            output = self._call(0, found.hidden, found.calls[0])
        if isinstance(output, tuple):
            self._extras = output[1:]
            if any(isinstance(extra, torch.Tensor) for extra in self._extras):
                raise cannot_stream(self.model, "has blocks that put out more than their activations")
            output = output[0]
        if not isinstance(output, torch.Tensor) or output.shape != found.hidden.shape:
            raise cannot_stream(self.model, "has blocks that change the shape of their activations")
        self._answers_known = True
        with torch.no_grad():
            self.run_front(inputs, into_tail=True)

    def run_block(self, number: int, hidden: torch.Tensor, call: BlockCall) -> torch.Tensor:
        """The activations that a block makes of ``hidden``."""
        output = self._call(number, hidden, call)
        found: torch.Tensor = output[0] if isinstance(output, tuple) else output
        if found.shape != hidden.shape:
            raise cannot_stream(self.model, f"changes the shape of the activations in {self.blocks[number]}")
        return found

    def run_tail(self, inputs: Mapping[str, Any], hidden: torch.Tensor, shapes: Mapping[str, Any]) -> Any:
        """The model's output, with ``hidden`` as what the last block puts out."""
        with self.tail_only(hidden, shapes):
            return self.model(**inputs)

    @contextmanager
    def tail_only(self, hidden: torch.Tensor, shapes: Mapping[str, Any]) -> Iterator[None]:
        """While open, the model's forward pass computes nothing but the tail.

        Raises:
            ProfilingError: the tail calls a module of the front again.
        """
        passed = False
        nothing = torch.full((), float("nan"), dtype=hidden.dtype, device=hidden.device).expand(hidden.shape)

        def block(number: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal passed
                passed = number == len(self.blocks) - 1
                return self._answer(hidden if passed else nothing)

            return forward

        def unit(path: str) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if passed:
                    raise cannot_stream(self.model, f"calls {path} before its blocks and after them")
                return tree_map(
                    lambda x: None if x is None else _nothing(x, hidden.device), shapes[path], is_leaf=_is_shape
                )

            return forward

        # A module of the front without weights (rotary frequencies) runs as it is: it costs nothing.
        heavy = [path for path in self.front if any(True for _ in self.model.get_submodule(path).parameters())]
        stubs = {path: unit(path) for path in heavy}
        stubs |= {path: block(number) for number, path in enumerate(self.blocks)}
        with self._replaced(stubs):
            yield

    def _call(self, number: int, hidden: torch.Tensor, call: BlockCall) -> Any:
        block = self.model.get_submodule(self.blocks[number])
        if call.by_name:
            return block(*call.args, **{call.by_name: hidden}, **call.kwargs)
        return block(hidden, *call.args, **call.kwargs)

    def _answer(self, hidden: torch.Tensor) -> Any:
        return hidden if self._extras is None else (hidden, *self._extras)

    @contextmanager
    def _replaced(self, forwards: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
        modules = {path: self.model.get_submodule(path) for path in forwards}
        for path, module in modules.items():
            module.forward = forwards[path]
        try:
            yield
        finally:
            for module in modules.values():
                del module.forward  # the class's own method is found again


def taken_call(call: BlockCall, rows: torch.Tensor, n: int) -> BlockCall:
    """What a block is given beside the activations of these rows, of a batch of ``n``."""

    def taken(x: Any) -> Any:
        return x[rows.to(x.device)] if isinstance(x, torch.Tensor) and x.dim() > 1 and len(x) == n > 1 else x

    return BlockCall(tree_map(taken, call.args), tree_map(taken, call.kwargs), call.by_name)


def cannot_stream(model: torch.nn.Module, why: str) -> ProfilingError:
    """The error for a model that cannot be streamed."""
    return ProfilingError(
        f"profiling.memory_mode: {type(model).__name__} {why}, so it cannot be streamed block by block; use plain or "
        "checkpointed on a machine with more memory"
    )


def refuse_non_finite_activations(model: torch.nn.Module, found: torch.Tensor, where: str, sample: int) -> None:
    """Raise ProfilingError where activations (or losses) are NaN or infinite: so are weights that are not in memory."""
    if not torch.isfinite(found).all():
        raise ProfilingError(
            f"{where} is not finite on calibration sample {sample}; either the model overflows on it (look for NaN "
            f"weights or leave it out), or {type(model).__name__} uses weights or outputs of one part in another and "
            "cannot be streamed: try profiling.memory_mode: plain"
        )


def _units(model: torch.nn.Module, blocks: Sequence[str]) -> Iterator[str]:
    """Paths of the largest modules that neither hold a block nor lie in one; lists of modules are not called."""

    def below(prefix: str, module: torch.nn.Module) -> Iterator[str]:
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            if path in blocks:
                continue
            holds = any(block.startswith(f"{path}.") for block in blocks)
            if holds or isinstance(child, (torch.nn.ModuleList, torch.nn.ModuleDict)):
                yield from below(path, child)
            else:
                yield path

    yield from below("", model)


def _split(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, BlockCall]:
    """(activations, everything else) of a block's arguments."""
    by_name = "" if args else "hidden_states"
    hidden = args[0] if args else kwargs.get(by_name)
    if not isinstance(hidden, torch.Tensor):
        raise cannot_stream(model, "does not give its blocks their activations as the first argument")
    return hidden, BlockCall(args[1:], {name: x for name, x in kwargs.items() if name != by_name or args}, by_name)


def _is_shape(x: Any) -> bool:
    return x is None or (isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], torch.dtype))


def _nothing(described: tuple[torch.Size, torch.dtype], device: torch.device) -> torch.Tensor:
    shape, dtype = described
    value = float("nan") if dtype.is_floating_point else 0
    return torch.full((), value, dtype=dtype, device=device).expand(shape)
