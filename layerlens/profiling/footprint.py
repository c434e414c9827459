"""What one step of the frozen model costs, counted by torch itself: bytes kept for the backward pass, and FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from layerlens.integrations.arguments import compares_towers, required, untaken
from layerlens.integrations.expert_products import plain_products
from layerlens.integrations.flops import FlopCounter
from layerlens.integrations.transformers import full_batches
from layerlens.tasks.losses import output_tensors

SAMPLES = 2
TOKENS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "decoder_input_ids",
    "decoder_attention_mask",
)
"""The arguments of models that read nothing but tokens."""
PLAIN = (torch.Tensor, torch.nn.Parameter, FakeTensor)
"""Not those that are sharded over processes."""


def count_saved_bytes(model: torch.nn.Module, run: Callable[[], object]) -> int:
    """Bytes that autograd keeps during ``run()``, every storage counted once, the model's own weights left out."""
    sizes: list[int] = []
    saved_tensors_seen(model, run, sizes.append)
    return sum(sizes)


def saved_tensors_seen(model: torch.nn.Module, run: Callable[[], object], see: Callable[[int], object]) -> None:
    """Call ``run()`` and tell ``see`` the bytes of every storage that autograd keeps, when it is first kept."""
    weights = (*model.parameters(), *model.buffers())
    # Known by the storage itself: those without data have no address.
    seen = {tensor.untyped_storage()._cdata for tensor in weights if type(tensor) in PLAIN}
    alive: list[object] = []  # a freed storage's place may be used again, so all are held until the count is done

    def pack(tensor: torch.Tensor) -> None:
        if isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter):
            return  # a weight that is elsewhere between passes (on disk, in shards) has another address then
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            see(storage.nbytes())
            alive.append(storage)

    # There is no backward pass. Tensors that the graph held would be in a cycle with it, and never be freed.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        alive.append(run())


def samples_in(inputs: dict[str, torch.Tensor]) -> int:
    """Tokens of a full batch; samples where the inputs are no tokens."""
    return inputs["input_ids"].numel() if "input_ids" in inputs else len(next(iter(inputs.values())))


@contextmanager
def opened_at(
    model: torch.nn.Module, first_block: str | None, inputs: dict[str, torch.Tensor]
) -> Iterator[Callable[[], torch.Tensor]]:
    """A forward pass of the frozen model whose backward pass would reach down to ``first_block`` (None: the inputs).

    Where that is an Embedding, which has no input with a gradient, down to its output.
    """

    def open_graph(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for place, given in enumerate(args):
            if _opens(given):
                return (*args[:place], given.detach().requires_grad_(True), *args[place + 1 :]), kwargs
        name = next((name for name, given in kwargs.items() if _opens(given)), None)
        return args, kwargs if name is None else {**kwargs, name: kwargs[name].detach().requires_grad_(True)}

    if first_block is None:
        opened = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
        yield lambda: _total(model(**opened))
        return
    module = model.get_submodule(first_block)
    if isinstance(module, torch.nn.Embedding):
        handle = module.register_forward_hook(lambda module, args, output: output.detach().requires_grad_(True))
    else:
        handle = module.register_forward_pre_hook(open_graph, with_kwargs=True)
    try:
        yield lambda: _total(model(**inputs))
    finally:
        handle.remove()


def _opens(given: Any) -> bool:
    return isinstance(given, torch.Tensor) and given.is_floating_point()


def frozen_footprint(
    model: torch.nn.Module, first_block: str | None, inputs: dict[str, torch.Tensor]
) -> tuple[float, float]:
    """(bytes kept, forward FLOPs), each per token, of a step whose backward pass reaches down to ``first_block``.

    Per sample where the inputs are no tokens, and down to the inputs where the model has no blocks.

    Adapting any layer of a block needs the activations above it; counting from the first block on is what a choice that
    touches the lowest layers needs, and an upper bound for every other. ``first_block`` may be an Embedding instead.
    """
    count = samples_in(inputs)
    with plain_products(model):  # torch counts no FLOPs of grouped ones
        with opened_at(model, first_block, inputs) as run:
            saved = count_saved_bytes(model, run)
        with torch.no_grad(), FlopCounter(model) as counter:
            model(**inputs)
    return saved / count, counter.get_total_flops() / count


@contextmanager
def without_data(model: torch.nn.Module) -> Iterator[None]:
    """While open, what the model on the meta device computes has shapes and sizes, as on a CPU, and no numbers.

    Inputs made inside have none either.
    """
    weights = [(module, name, weight) for module in model.modules() for name, weight in module._parameters.items()]
    twins: dict[int, torch.nn.Parameter] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), full_batches():
        try:
            for module, name, weight in weights:
                if weight is not None and weight.is_meta:
                    twin = torch.nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), requires_grad=False)
                    module._parameters[name] = twins.setdefault(id(weight), twin)
            yield
        finally:
            for module, name, weight in weights:
                module._parameters[name] = weight


def dense_inputs(
    batch_inputs: dict[str, torch.Tensor], sequence_length: int, *, samples: int = SAMPLES, model: Any = None
) -> dict[str, torch.Tensor]:
    """A full batch (no padding) of ``samples`` × ``sequence_length`` tokens, repeating those of a real sample.

    All rows are alike and end as the sample does: BART's and T5's classifiers read the last end of a text, and want as
    many of them in every sample.

    Other inputs than tokens (images) are those of the batch's samples, over and over. So are all where ``model`` cannot
    do without some that are no tokens, and the tokens of a model that takes no mask, which is the user's own: it may
    have a length of its own, and other arguments.
    """
    needed = () if model is None else required(model)
    own = "input_ids" not in batch_inputs or "attention_mask" not in batch_inputs
    own = own or (model is not None and compares_towers(model))
    if own or any(name in batch_inputs and name not in TOKENS for name in needed):
        n = len(next(iter(batch_inputs.values())))
        return {name: tensor[torch.arange(samples) % n] for name, tensor in batch_inputs.items()}
    ids = batch_inputs["input_ids"][0].reshape(-1)
    if batch_inputs["attention_mask"][0].shape == ids.shape:
        ids = ids[batch_inputs["attention_mask"][0] != 0]
    row = ids.repeat(-(-sequence_length // ids.numel()))[:sequence_length].clone()
    row[-1] = ids[-1]
    full = row.repeat(samples, 1)
    inputs = {"input_ids": full}
    if model is None or not untaken(model, ["attention_mask"]):
        inputs["attention_mask"] = torch.ones_like(full)
    return inputs | ({"decoder_input_ids": full} if "decoder_input_ids" in batch_inputs else {})


def _total(output: Any) -> torch.Tensor:
    """A number that every part of a model's output goes into."""
    return torch.stack([tensor.sum() for tensor in output_tensors(output)]).sum()
