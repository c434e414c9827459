"""Taps on every module of a model: each layer's inputs meet its output gradients here.

An identity autograd function sits on each module's output. It saves the module's input through ``save_for_backward``
(so that checkpointing and offloading see it) and hands it on with the output's gradient in its backward. The model is
not changed.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch

from layerlens.exceptions import ProfilingError
from layerlens.integrations.attention import attention_outputs
from layerlens.integrations.expert_products import Routing, plain_products
from layerlens.integrations.torch_modules import first_input
from layerlens.integrations.weight_matrices import conv_patches, embedding_scale, is_convolution
from layerlens.methods import OUTPUT
from layerlens.models import LORA, LayerSpec, ModelSpec
from layerlens.models.model_spec import EMBEDDING, EXPERTS
from layerlens.profiling.expert_rows import by_expert
from layerlens.profiling.layouts import Layout
from layerlens.profiling.pass_sums import Key
from layerlens.profiling.sample_matrices import SampleMatrices
from layerlens.registry import METHODS

Recorder = Callable[..., None]
Hook = Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any], torch.Tensor], torch.Tensor]
IN_FRONT = Layout()


class _Tap(torch.autograd.Function):
    """Identity in the forward pass; in the backward pass hands the gradient and the saved tensors to ``recorder``.

    ``anchor`` is a scalar that requires a gradient, so that the backward pass comes by although all weights are frozen.
    An output with a batch dimension of 1 that the model broadcasts (position embeddings) is expanded to ``batch``
    samples, so that its gradient comes back for each sample. Any other output is the same memory in a tensor of its
    own, which the model may change in place: autograd forbids that on a view.
    """

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, anchor: torch.Tensor, batch: int, recorders: tuple[Recorder, Recorder],
        *saved: torch.Tensor,
    ) -> Any:  # fmt: skip
        ctx.save_for_backward(*saved)
        ctx.n_saved, (ctx.recorder, ctx.lost) = len(saved), recorders
        ctx.broadcast = output.dim() > 1 and output.shape[0] == 1 and batch > 1
        if ctx.broadcast:
            return output.expand(batch, *output.shape[1:])
        with torch.no_grad():
            same_memory: Any = torch.empty(0, dtype=output.dtype, device=output.device)
            return same_memory.set_(output.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        try:
            saved = ctx.saved_tensors
        except RuntimeError:  # the model has changed the input since, which a frozen Linear does not mind
            ctx.lost()
        else:
            ctx.recorder(gradients[0], *saved)
        passed_on = gradients[0].sum(dim=0, keepdim=True) if ctx.broadcast else gradients[0]
        return passed_on, None, None, None, *([None] * ctx.n_saved)


class Taps:
    """The taps of one model, and what is known of the forward pass that they see; ``Capture`` says what becomes of it.

    Args:
        model: the frozen model, in evaluation mode.
        spec: its layers.
        other_modules: modules outside the layers whose weights are measured too (Linear, convolutions, Embedding).
            Weights that several of them share are measured as one: the gradient of a tied weight is the sum over its
            uses.
        backward: whether gradients are wanted; without, nothing is tapped.
        by_batches: whether a batch counts as one sample. The model may then be called several times for it, with masks
            that only its calls show, and activations need no axis of samples.
    """

    def __init__(
        self, model: torch.nn.Module, spec: ModelSpec, other_modules: Sequence[str], *, backward: bool,
        by_batches: bool = False,
    ) -> None:  # fmt: skip
        self.model = model
        self.spec = spec
        self.other_modules = tuple(other_modules)
        self.loss_scale = 1.0
        self._with_backward = backward
        self.by_batches = by_batches
        self._anchor = torch.zeros((), requires_grad=True)
        self.unmeasured: dict[str, str] = {}
        self.layouts: Mapping[str, Layout] | None = None
        self._calls: Counter[str] = Counter()
        self._users: dict[Key, set[str]] = {}
        self._leaders: dict[str, str] = {}
        self._last_input: torch.Tensor | None = None
        self._n_inputs = 0
        self._read: dict[str, list[int]] = {}
        self._in_backward = False
        self._n_batch = 0
        self._masks: dict[Any, torch.Tensor | None] = {}
        self._weight_keys = self._tied_weights()

    def collect(
        self, key: Key, d__bgto: torch.Tensor, z__bgti: torch.Tensor, mask__bt: torch.Tensor | None, leader: str,
        counts__bg: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Take one call of a multiplying module; ``leader`` is the layer that its inputs are summed for.

        ``counts__bg`` says how many tokens of each group are no padding, where groups have tokens of their own.
        """
        raise NotImplementedError

    def collect_lookup(
        self, key: Key, matrices: SampleMatrices, module: Any, mask__bt: torch.Tensor | None = None
    ) -> None:
        """Take one use of a weight that is looked up; ``mask__bt`` says of a layer's which indices are no padding."""
        raise NotImplementedError

    def leave_out(self, name: str, reason: str) -> None:
        """Measure a layer, or a parameter, no further; ``unmeasured`` has it then."""
        self.unmeasured.setdefault(name, reason)

    def leave_out_module(self, name: str, reason: str) -> None:
        """``leave_out`` of a layer, or of the weight of another module."""
        key = self._weight_keys.get(name)
        self.leave_out(name if key is None else key[0], reason)

    def expect(self, n_batch: int) -> None:
        """A forward pass of so many rows, whose activations nobody collects."""
        self._n_batch = n_batch

    def uses(self, key: Key) -> int:
        """How often a layer, or a weight, was called in this forward pass."""
        return sum(self._calls[name] for name in self._users.get(key) or {key[0]})

    def _tied_weights(self) -> dict[str, Key]:
        """Module -> key of its weight, which tied modules share."""
        first: dict[int, Key] = {}
        keys: dict[str, Key] = {}
        for name in self.other_modules:
            weight: Any = self.model.get_submodule(name).weight
            keys[name] = first.setdefault(id(weight), (f"{name}.weight", "weight"))
        return keys

    @contextmanager
    def open(self) -> Iterator[None]:
        """Put the taps on the model; they are gone afterwards, whatever happens."""
        with ExitStack() as stack:
            attentions: dict[int, LayerSpec] = {}
            experts: dict[tuple[int, str], LayerSpec] = {}
            for layer in self.spec.layers:
                if layer.name in self.unmeasured:
                    continue
                module = self.model.get_submodule(layer.module)
                if layer.layer_type == EXPERTS:
                    experts[id(module), layer.name.rpartition(".")[2]] = layer
                elif layer.layer_type == "attention":
                    attentions[id(module)] = layer
                elif layer.layer_type == EMBEDDING:
                    hook = self._lookup_hook(layer.name, (layer.name, LORA), cast("torch.nn.Embedding", module))
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
                else:
                    hook = self._dense_hook(layer)
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            for module in self.model.modules():
                if getattr(module, "gradient_checkpointing", False) and self._with_backward:
                    stack.callback(module.register_forward_pre_hook(_open_graph).remove)
            for name in self.other_modules:
                if self._weight_keys[name][0] in self.unmeasured:
                    continue
                module = self.model.get_submodule(name)
                hook = self._weight_hook(name, module)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            for module in self.model.modules() if self.by_batches else ():
                if "attention_mask" in inspect.signature(module.forward).parameters and hasattr(module, "config"):
                    stack.callback(module.register_forward_pre_hook(self._see_mask, with_kwargs=True).remove)

            def on_attention(module: torch.nn.Module, query: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
                layer = attentions.get(id(module))
                return output if layer is None else self._tap_attention(layer, query, output)

            def on_experts(
                module: torch.nn.Module, name: str, rows: torch.Tensor, output: torch.Tensor, routing: Routing
            ) -> torch.Tensor:
                layer = experts.get((id(module), name))
                return output if layer is None else self._tap_experts(layer, rows, output, routing)

            if attentions:
                stack.enter_context(attention_outputs(self.model, on_attention))
            if experts:
                stack.enter_context(plain_products(self.model, on_experts))
            yield

    def _dense_hook(self, layer: LayerSpec) -> Hook:
        methods = [METHODS[name] for name in layer.methods]
        with_output = any(method.reads == OUTPUT for method in methods)
        module = self.model.get_submodule(layer.name)
        convolution = module if is_convolution(module) else None

        def tokens(tensor: torch.Tensor) -> torch.Tensor:
            if convolution is None:
                return self._as_tokens(layer.name, tensor)
            return self._of_samples(layer.name, tensor.flatten(2).mT[:, None])

        def record(
            mask__bt: torch.Tensor | None, gradient: torch.Tensor, h: torch.Tensor, y: torch.Tensor | None = None
        ) -> None:
            if layer.name in self.unmeasured:
                return
            try:
                d__bgto, y__bgto = tokens(gradient), None if y is None else tokens(y)
                if convolution is None:
                    h__bgti = tokens(h)
                else:
                    h__bgti = self._of_samples(layer.name, conv_patches(convolution, h, groups=1))
            except ProfilingError as error:
                self.leave_out(layer.name, str(error))
                return
            for method in methods:
                # Every layer with an input of its own can take LoRA, so those with the same one find its sums there.
                leader = self._leaders.get(layer.name, layer.name) if method.name == LORA else layer.name
                d, z = method.layer_operands(layer, module, d__bgto, h__bgti, y__bgto)
                self.collect((layer.name, method.name), d, z, mask__bt, leader)

        def hook(
            module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
        ) -> torch.Tensor:
            self._count_call(layer.name)
            h = first_input(args, kwargs)
            if convolution is None and LORA in layer.methods:  # inputs of a convolution are patches
                self._follow(layer.name, h)
            # The model may change its output in place, so what is kept of it is a copy.
            saved = (h.detach(), output.detach().clone()) if with_output else (h.detach(),)
            mask__bt = self._mask_of(layer.name, output) if convolution is None else None
            return self._tap(layer.name, layer.name, output, partial(record, mask__bt), *saved)

        return hook

    def _weight_hook(self, name: str, module: Any) -> Hook:
        """For a module outside the layers: its weight's gradient alone, with the other uses of the same weight."""
        key = self._weight_keys[name]
        self._users.setdefault(key, set()).add(name)
        if isinstance(module, torch.nn.Embedding):
            return self._lookup_hook(name, key, module)

        def record(mask__bt: torch.Tensor | None, gradient: torch.Tensor, saved: torch.Tensor) -> None:
            if key[0] in self.unmeasured:
                return
            try:
                if is_convolution(module):
                    of_groups = gradient.reshape(len(gradient), module.groups, -1, gradient[0, 0].numel()).mT
                    d__bgto = self._of_samples(name, of_groups)
                    z__bgti = self._of_samples(name, conv_patches(module, saved))
                else:
                    d__bgto, z__bgti = self._as_tokens(name, gradient), self._as_tokens(name, saved)
            except ProfilingError as error:
                self.leave_out(key[0], str(error))
                return
            self.collect(key, d__bgto, z__bgti, mask__bt, f"{name}|weight")

        def hook(
            module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
        ) -> torch.Tensor:
            self._count_call(name)
            mask__bt = None if is_convolution(module) else self._mask_of(name, output)
            return self._tap(name, key[0], output, partial(record, mask__bt), first_input(args, kwargs).detach())

        return hook

    def _lookup_hook(self, name: str, key: Key, module: torch.nn.Embedding) -> Hook:
        """For an Embedding: the gradients of the rows that are looked up."""
        scale = embedding_scale(module)

        def record(mask__bt: torch.Tensor | None, gradient: torch.Tensor, saved: torch.Tensor) -> None:
            if key[0] in self.unmeasured:
                return
            try:
                d__bgto, ids__bgti = self._as_tokens(name, gradient), self._as_tokens(name, saved[..., None])
            except ProfilingError as error:
                self.leave_out(key[0], str(error))
                return
            ids__bt, rows__bti = ids__bgti[:, 0, :, 0].expand(len(d__bgto), -1), d__bgto[:, 0]
            rows__bti = rows__bti if self.loss_scale == 1.0 else rows__bti.float()
            rows__bti = rows__bti * (scale / self.loss_scale)
            if module.padding_idx is not None:
                rows__bti = rows__bti * (ids__bt != module.padding_idx)[..., None]
            if mask__bt is not None and mask__bt.shape != ids__bt.shape:
                mask__bt = None
            self.collect_lookup(key, SampleMatrices(ids__bt=ids__bt, rows__bti=rows__bti), module, mask__bt)

        def hook(
            module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
        ) -> torch.Tensor:
            self._count_call(name)
            ids = first_input(args, kwargs).detach()
            return self._tap(name, key[0], output, partial(record, self._mask_of(name, output)), ids)

        return hook

    def _tap_attention(self, layer: LayerSpec, query: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        self._count_call(layer.name)
        methods = [METHODS[name] for name in layer.methods]
        mask__bt = self._mask_of(layer.name, output.flatten(2))

        def record(gradient__btgo: torch.Tensor, query__bgti: torch.Tensor) -> None:
            if layer.name in self.unmeasured:
                return
            try:
                d__bgto = self._of_samples(layer.name, gradient__btgo.transpose(1, 2))
                z__bgti = self._of_samples(layer.name, query__bgti)
            except ProfilingError as error:
                self.leave_out(layer.name, str(error))
                return
            for method in methods:
                d, z = method.gradient_operands(d__bgto, z__bgti)
                self.collect((layer.name, method.name), d, z, mask__bt, layer.name)

        return self._tap(layer.name, layer.name, output, record, query.detach())

    def _tap_experts(
        self, layer: LayerSpec, rows: torch.Tensor, output: torch.Tensor, routing: Routing
    ) -> torch.Tensor:
        self._count_call(layer.name)
        batch = 1 if self.by_batches else self._n_batch  # the samples of a batch that counts as one need not be told
        length = routing.n_tokens // batch
        if length * batch != routing.n_tokens:
            self.leave_out(
                layer.name, f"gets {routing.n_tokens} tokens of {batch} samples, and not the same number for each"
            )
        if layer.name in self.unmeasured:
            return output
        masks = [mask for mask in self._masks.values() if mask is not None and mask.numel() == routing.n_tokens]
        mask = next(iter(masks), None) if self.by_batches else self._masks.get(length)

        def record(gradient: torch.Tensor, z: torch.Tensor) -> None:
            if layer.name in self.unmeasured:
                return
            mask__n = None if mask is None else mask.flatten()
            d__bgto, z__bgti, counts__bg = by_expert(gradient, z, routing, batch, mask__n)
            self.collect((layer.name, LORA), d__bgto, z__bgti, None, layer.name, counts__bg)

        return self._tap(layer.name, layer.name, output, record, rows.detach())

    def _tap(
        self, module: str, name: str, output: torch.Tensor, record: Recorder, *saved: torch.Tensor
    ) -> torch.Tensor:
        """The output of a module with a tap on it; ``name`` is left out where its input is lost."""
        if not self._with_backward:
            return output
        alone = self.by_batches or self._layout(module).axis > 0  # no samples to tell apart, or none in front
        batch = 1 if alone else self._n_batch
        lost = partial(self.leave_out, name, "its input is changed in place after it was read")
        return _Tap.apply(output, self._anchor, batch, (record, lost), *saved)

    def _count_call(self, name: str) -> None:
        if not self._in_backward:  # checkpointing runs forward passes again inside the backward pass
            self._calls[name] += 1

    def _follow(self, name: str, h: torch.Tensor) -> None:
        """Note which input a layer reads; one right after another may read the very same (query, key, value)."""
        if self._in_backward:
            return
        if self._last_input is not h:
            self._n_inputs += 1
        self._last_input = h
        self._read.setdefault(name, []).append(self._n_inputs)

    def settle_leaders(self) -> None:
        """After a forward pass: let layers that read the very same inputs, call by call, share the sums of these."""
        first: dict[tuple[int, ...], str] = {}
        for name, read in self._read.items():
            leader = first.setdefault(tuple(read), name)
            if self._leaders.setdefault(name, leader) != leader:
                self.leave_out(
                    name, f"has the same input as {self._leaders[name]} in some forward passes and not in others"
                )
        self._read.clear()
        self._last_input = None

    def _see_mask(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the mask [b, t] that a model inside the model is called with, for activations [b, t, k]."""
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")
        if isinstance(given, torch.Tensor) and given.dim() == 2 and not self._in_backward:
            self._masks[tuple(given.shape)] = None if bool(given.all()) else given

    def _layout(self, module: str) -> Layout:
        return IN_FRONT if self.layouts is None else self.layouts.get(module, IN_FRONT)

    def _mask_of(self, module: str, output: torch.Tensor) -> torch.Tensor | None:
        """The mask [b, t] of an output [b, t, k], [t, b, k] or [b · t, k], where there is padding."""
        if self.by_batches:
            return self._masks.get(tuple(output.shape[:2])) if output.dim() == 3 else None
        axis, batch = self._layout(module).axis, self._n_batch
        if output.dim() == 2 and axis == 0:
            return self._masks.get(len(output) // batch)
        if output.dim() == 3 and axis < 2:
            size, other = output.shape[axis], output.shape[1 - axis]
            if size == batch:
                return self._masks.get(other)
            return self._masks.get(size // batch) if other == 1 else None
        return None

    def _as_tokens(self, module: str, tensor: torch.Tensor) -> torch.Tensor:
        """What a module gets, or puts out, as [b, 1, t, k]; one row stands for all samples.

        Raises:
            ProfilingError: the samples of the rows are not known.
        """
        if self.by_batches:
            return tensor.reshape(len(tensor) if tensor.dim() > 1 else 1, 1, -1, tensor.shape[-1])
        if self._n_batch == 1:
            return tensor.reshape(1, 1, -1, tensor.shape[-1])
        found = self._in_front(module, tensor)
        return found.reshape(len(found), 1, -1, found.shape[-1])

    def _of_samples(self, module: str, rows__ngtk: torch.Tensor) -> torch.Tensor:
        """[rows of the leading axis, g, t, k] as [b, g, rows of a sample · t, k]; see ``_as_tokens``."""
        if self.by_batches or len(rows__ngtk) == 1:
            return rows__ngtk
        if self._n_batch == 1:
            return rows__ngtk.transpose(0, 1).flatten(1, 2)[None]
        found = self._in_front(module, rows__ngtk)
        return found if found.dim() == 4 else found.transpose(1, 2).flatten(2, 3)

    def _in_front(self, module: str, tensor: torch.Tensor) -> torch.Tensor:
        """[b, ...], or [1, ...] where one row stands for all samples."""
        batch = self._n_batch
        known = self.layouts is not None and module in self.layouts
        if not known and not self.layouts and tensor.dim() > 1 and len(tensor) in (1, batch):
            return tensor
        if (not known and self.layouts is not None) or tensor.dim() < 2:
            raise ProfilingError(
                f"gets activations {list(tensor.shape)} of {batch} samples, and its rows cannot be traced to samples"
            )
        layout = self._layout(module)
        if layout.axis == 0 and len(tensor) == 1:
            return tensor
        return layout.in_front(tensor, batch)


def _open_graph(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Let a checkpointed block's input require a gradient: reentrant checkpointing passes none back otherwise."""
    if args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point() and not args[0].requires_grad:
        return (args[0].detach().requires_grad_(True), *args[1:])
    return None
