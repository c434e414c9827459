"""A double of a trainer: batches are read and losses computed in it, so nothing is written to the trainer itself.

The double shares what is large (model, data set, tokenizer) and has its own of what a loader or a loss writes to: every
attribute, the lists, dictionaries, counters and plain objects behind them, the accelerator, the arguments. What is one
for the whole process (accelerate's gradient state) or belongs to the shared objects (the modules beside the model, the
tokenizers) is noted before and put back after.
"""

from __future__ import annotations

import collections
import copy
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

CONTAINERS = (dict, list, set, tuple, collections.defaultdict, collections.OrderedDict, collections.deque)
LIBRARIES = ("torch", "transformers", "datasets", "accelerate", "peft", "tokenizers", "numpy", "builtins")
"""Whose objects are shared, except the few that are named here; what a user wrote is copied."""
OWN = ("TrainerState", "TrainerControl", "Accelerator")


class RecordingCollator:
    """A data collator that notes which samples each batch was made of; otherwise the one it was made from."""

    def __init__(self, collator: Callable[..., Any]) -> None:
        self.collator = collator
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, rows: Any, *more: Any, **named: Any) -> Any:
        self.calls.append(tuple(rows) if isinstance(rows, (list, tuple)) else ())
        return self.collator(rows, *more, **named)

    def __getattr__(self, name: str) -> Any:
        if name in ("collator", "calls"):  # not there yet
            raise AttributeError(name)
        return getattr(self.collator, name)


@contextmanager
def double_of(trainer: Any, model: torch.nn.Module) -> Iterator[Any]:
    """A trainer that reads the same data with the same loss, in this process and without logging.

    Args:
        trainer: it and all that it holds, ``model`` apart, is as before afterwards.
        model: what is measured, whose keeping is the caller's.
    """
    double = copy.copy(trainer)
    own = vars(double)
    for name, value in vars(trainer).items():
        of_trainer = isinstance(value, types.MethodType) and value.__self__ is trainer
        own[name] = types.MethodType(value.__func__, double) if of_trainer else _own(value)
    args = copy.copy(trainer.args)
    vars(args).update(
        dataloader_num_workers=0, dataloader_persistent_workers=False, dataloader_prefetch_factor=None,
        dataloader_multiprocessing_context=None, _n_gpu=min(trainer.args.n_gpu, 1),
    )  # fmt: skip
    own.update(
        args=args,
        data_collator=RecordingCollator(_own(trainer.data_collator)),
        log=lambda *logs, **named: None,
        current_gradient_accumulation_steps=1,
    )
    if hasattr(trainer.accelerator, "dataloader_config"):  # sentence-transformers sets even_batches in it
        double.accelerator.dataloader_config = copy.copy(trainer.accelerator.dataloader_config)
    gradient_state = trainer.accelerator.gradient_state.__dict__
    before = {name: _own(value) for name, value in gradient_state.items()}
    tokenizers = _tokenizers(trainer)
    backends = [(one, one.padding, one.truncation) for one in {id(x): x for x in map(_backend, tokenizers)}.values()]
    # a model notes in its configuration for which loss it took its labels, a tokenizer what it has warned of,
    # and a stream how far it was read
    noting = (*_configurations(trainer.model), *tokenizers, *_stages(trainer.train_dataset))
    tables = [table for one in noting for table in _tables(one)]
    contents = [dict(table) for table in tables]
    with _modules_kept(_modules_beside(trainer, model)):
        try:
            yield double
        finally:
            gradient_state.clear()
            gradient_state.update(before)
            for table, was in zip(tables, contents, strict=True):
                table.clear()
                table.update(was)
            for backend, padding, truncation in backends:
                backend.no_padding() if padding is None else backend.enable_padding(**padding)
                backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)


def _own(value: Any) -> Any:
    """A value whose changes are nobody else's; what is large is shared."""
    kind = type(value)
    if isinstance(value, (torch.nn.Module, type, types.FunctionType)):
        return value
    if isinstance(value, torch.Tensor):
        return value if isinstance(value, torch.nn.Parameter) else value.detach().clone()
    if kind in CONTAINERS:
        return _own_container(value)
    if hasattr(value, "__dict__") and (kind.__module__.partition(".")[0] not in LIBRARIES or kind.__name__ in OWN):
        try:
            found = copy.copy(value)
        except TypeError:  # it holds what cannot be copied: a lock, a file
            return value
        if found is not value:
            vars(found).update({name: _own_container(x) for name, x in vars(value).items() if type(x) in CONTAINERS})
        return found
    return value


def _own_container(value: Any) -> Any:
    if isinstance(value, dict):
        found = copy.copy(value)
        found.update({key: _own_part(part) for key, part in value.items()})
        return found
    parts = [_own_part(part) for part in value]
    return collections.deque(parts, value.maxlen) if isinstance(value, collections.deque) else type(value)(parts)


def _own_part(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        return value.detach().clone()
    return _own_container(value) if type(value) in CONTAINERS else value


def _modules_beside(trainer: Any, model: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules that the trainer has beside the measured one: losses, a reference model, a teacher."""
    held = list(vars(trainer).values())
    held += [part for value in held if isinstance(value, (dict, list, tuple)) for part in _parts(value)]
    of_model = {id(module) for module in model.modules()}
    found = {
        id(module): module
        for value in held
        if isinstance(value, torch.nn.Module)
        for module in value.modules()
        if id(module) not in of_model
    }
    return list(found.values())


def _parts(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else list(value)


@contextmanager
def _modules_kept(modules: list[torch.nn.Module]) -> Iterator[None]:
    """While open, these modules have weights without gradients; they are as before afterwards."""
    attributes = [(module, dict(vars(module))) for module in modules]
    tables = [value for _, own in attributes for value in own.values() if isinstance(value, dict)]
    before = [value.copy() for value in tables]
    buffers = [(buffer, buffer.detach().clone()) for module in modules for buffer in module.buffers(recurse=False)]
    weights = [
        (weight, weight.requires_grad, weight.grad) for module in modules for weight in module.parameters(recurse=False)
    ]
    try:
        for weight, _, _ in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for module, own in attributes:
            vars(module).clear()
            vars(module).update(own)
        for table, was in zip(tables, before, strict=True):
            table.clear()
            table.update(was)
        for buffer, values in buffers:
            buffer.detach().copy_(values)
        for weight, required, gradient in weights:
            weight.requires_grad_(required)
            weight.grad = gradient


def _configurations(model: torch.nn.Module) -> list[Any]:
    """The configurations that a model's modules have, each once."""
    held = [config for module in model.modules() if (config := getattr(module, "config", None)) is not None]
    return list({id(config): config for config in held if hasattr(config, "__dict__")}.values())


def _tokenizers(trainer: Any) -> list[Any]:
    """The tokenizers that the trainer's collation may set padding and truncation of, each once."""
    held = [getattr(trainer, "processing_class", None), trainer.data_collator, trainer.model]
    held += [getattr(holder, "tokenizer", None) for holder in held]
    return list({id(one): one for one in held if _backend(one) is not None}.values())


def _backend(tokenizer: Any) -> Any:
    return getattr(tokenizer, "backend_tokenizer", None)


def _stages(data: Any) -> list[Any]:
    """A data set that is only iterated over, and what ``datasets`` reads its rows through, the last stage first."""
    found = [data] if hasattr(data, "__dict__") and not hasattr(data, "__len__") else []
    stage = getattr(data, "_ex_iterable", None)
    while stage is not None:
        found.append(stage)
        stage = getattr(stage, "ex_iterable", None)
    return found


def _tables(thing: Any) -> list[dict[Any, Any]]:
    """The attributes of an object, and those of them that are dictionaries."""
    return [vars(thing), *(value for value in vars(thing).values() if type(value) is dict)]
