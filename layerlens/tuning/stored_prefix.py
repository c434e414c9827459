"""Everything below the lowest adapted block computed once for each sample, and read from disk from then on.

What is frozen and not random gives the same activations for a sample in every epoch. ``StoredPrefix`` keeps what the
last block below the lowest adapted one passes on, and in later epochs hands it on again without computing it or the
blocks under it. Masks and positions are made by the model itself, from each batch as it is.

It sits on the model (a hook before its forward pass), so any trainer can be used::

    with StoredPrefix(trainer.model, Path("activations"), samples=len(trainer.train_dataset), tell=print):
        trainer.train()

Before the first sample is stored, and once more before the first is used, the model itself says whether that is right:

- nothing that trains lies below;
- two passes with other random states give the same activations;
- a sample alone has those that it has beside longer ones;
- what is stored, and the loss from it, are those of a full pass, but for rounding.

Otherwise nothing is stored or used, and the reason is given.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from layerlens.exceptions import ConfigurationError
from layerlens.integrations.peft import base_of
from layerlens.integrations.transformers import blocks_of
from layerlens.methods import injected_sizes
from layerlens.tuning.prefix_file import Given, PrefixFile, PrefixRefused
from layerlens.utils.atomic import cannot_write

DIRECTORY = "stored_prefix"
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Of the largest activation: sums over another number of masked tokens have another order. A block adds up some 1e3
terms of 2^-24 each, and 1e2 blocks do so one after the other."""
COARSE = 2e-2
"""The same in bfloat16 and float16, whose terms are 2^-8 and 2^-11."""
ROOM = 1.1
"""Free space on the disk, against what is to be stored: later samples may be longer than the first ones."""


class _Stop(Exception):
    """Ends a forward pass where the last block below has been computed."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class StoredPrefix:
    """Stores the activations below the lowest adapted block on disk, and reuses them from the second epoch on.

    Args:
        model: a model that ``layerlens.tuning.apply`` or PEFT prepared: the module that the trainer calls.
        directory: folder of the file. ``file.remove()`` frees the disk space.
        samples: number of training samples, to announce the disk space; None: do not announce it.
        switch_off_dropout: True: disable dropout below the lowest adapted block. False: store nothing if dropout acts
            there.
        dtype: precision of the stored activations; by default, that of the activations.
        required: True: raise an error if nothing can be stored. False: train without stored activations.
        tell: called with each line for the user.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        directory: Path,
        *,
        samples: int | None = None,
        switch_off_dropout: bool = False,
        dtype: torch.dtype | None = None,
        required: bool = False,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.model, self.samples, self.tell = model, samples, tell
        self.switch_off_dropout, self.required = switch_off_dropout, required
        self.file = PrefixFile(directory, dtype)
        self.reason = ""
        self.below: list[torch.nn.Module] = []
        self.of = 0
        self.reused = 0
        self._prepared = self._verified = self._probing = self._filling = False
        self._recording: Given | None = None
        self._using: torch.Tensor | None = None
        self._calls = 0
        self._like: torch.Tensor | None = None
        self._wrap: Callable[[torch.Tensor], Any] = lambda hidden: hidden
        self._handles: list[Any] = []
        self._forwards: list[tuple[torch.nn.Module, Any]] = []

    def __enter__(self) -> StoredPrefix:
        """Begin to store and to use."""
        self._handles.append(self.model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True))
        self._handles.append(self.model.register_forward_hook(self._after, always_call=True))
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the model as it was; the file stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._restore()
        self._prepared = self._verified = False

    @property
    def facts(self) -> dict[str, int] | None:
        """Blocks that are skipped, of how many, bytes that are stored; None where nothing is."""
        if self.reason or not self.file.end:
            return None
        return {"blocks_skipped": len(self.below), "blocks": self.of, "bytes": self.file.end}

    def fill(self, passes: Iterator[Callable[[], Any]]) -> None:
        """Store what these forward passes give below the lowest adapted block, which is as far as they go."""
        self._filling = True
        try:
            for run in passes:
                try:
                    with torch.no_grad():
                        run()
                except _Stop:
                    continue
                if self.reason:
                    return
        finally:
            self._filling = False

    def _refuse(self, reason: str) -> None:
        self.reason, self._recording, self._using = reason, None, None
        self._restore()
        self.file.remove()
        if self.required:
            raise ConfigurationError(
                f"training.store_prefix: the activations below the lowest adapted block cannot be stored: {reason}; "
                "set it to auto to train without"
            )
        self.tell(f"training.store_prefix: nothing is stored: {reason}")

    def _restore(self) -> None:
        for block, own in self._forwards:
            block.__dict__.pop("forward", None)
            if own is not None:
                block.forward = own
        self._forwards.clear()

    def _before(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self.reason or self._probing or not (self._filling or (module.training and torch.is_grad_enabled())):
            return
        try:
            given = Given.of(args, kwargs)
            if not self._prepared:
                self._prepare(args, kwargs, given)
            self._calls, found = 0, self.file.find(given)
            if found is not None and self._filling:
                raise _Stop(None)
            if found is not None and self._like is not None:
                found = found.to(device=self._like.device, dtype=self._like.dtype)
                if not self._verified:
                    self._verify(args, kwargs, given, found)
                self._using, self.reused = found, self.reused + 1
            else:
                self._recording = given
        except PrefixRefused as refused:
            self._refuse(str(refused))

    def _after(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if not self._probing:
            self._recording = self._using = None

    def _prepare(self, args: Any, kwargs: dict[str, Any], given: Given) -> None:
        """Find the blocks below, and make sure that they are frozen, not random, and the same beside other samples."""
        self.below, self.of = _below(self.model)
        base = base_of(self.model)
        names = {id(module): name for name, module in base.named_modules()}
        for place, block in enumerate(self.below):
            self._forwards.append((block, block.__dict__.get("forward")))
            block.forward = self._forward_of(block, last=place == len(self.below) - 1)
        begun: dict[int, torch.nn.Module] = {}
        done: dict[int, torch.nn.Module] = {}
        hooks = [
            handle
            for module in base.modules()
            for handle in (
                module.register_forward_pre_hook(lambda module, _: begun.__setitem__(id(module), module)),
                module.register_forward_hook(lambda module, _, __: done.__setitem__(id(module), module)),
            )
        ]
        try:
            output = self._probe(args, kwargs, seed=1)
        finally:
            for handle in hooks:
                handle.remove()
        hidden, self._wrap = _hidden(output)
        done |= {id(module): module for module in self.below[-1].modules()}
        trains = next((m for m in begun.values() if any(p.requires_grad for p in m.parameters(recurse=False))), None)
        if trains is not None:
            raise PrefixRefused(f"{names[id(trains)]} trains below it")
        if hidden.requires_grad:
            raise PrefixRefused("reentrant checkpointing asks for gradients below it")
        other, _ = _hidden(self._probe(args, kwargs, seed=2))
        if not _alike(hidden, other, given):
            if not self.switch_off_dropout:
                raise PrefixRefused(
                    "the blocks below are random in training (dropout); store_prefix: true disables dropout there"
                )
            self._handles += [module.register_forward_pre_hook(_in_evaluation_mode) for module in done.values()]
            hidden, other = (_hidden(self._probe(args, kwargs, seed=seed))[0] for seed in (1, 2))
            if not _alike(hidden, other, given):
                raise PrefixRefused("the blocks below are random even without dropout")
            self.tell(f"training.store_prefix: dropout is off in the {len(self.below)} blocks below the lowest adapted")
        self._same_alone(args, kwargs, given, hidden)
        self._like = hidden.detach()[:0]
        self._tell_size(given, hidden)
        self._prepared = True

    def _same_alone(self, args: Any, kwargs: dict[str, Any], given: Given, hidden: torch.Tensor) -> None:
        """Raise PrefixRefused where the shortest sample of a padded batch has other activations by itself."""
        if given.mask is None or bool(given.mask.all()) or args:
            return
        row = int(given.mask.sum(dim=1).argmin())
        own, shape = given.mask[row], given.mask.shape
        alone: dict[str, Any] = {}
        for name, value in kwargs.items():
            if isinstance(value, torch.Tensor) and value.dim():
                value = value[row : row + 1]
                value = value[:, own.to(value.device)] if (len(shape), value.shape[1:2]) == (2, shape[1:]) else value
            alone[name] = value
        by_itself, _ = _hidden(self._probe((), alone, seed=1))
        if not _near(by_itself[0], given.rows(hidden)[row]):
            raise PrefixRefused("the activations of a sample depend on how far its batch is padded")

    def _tell_size(self, given: Given, hidden: torch.Tensor) -> None:
        if self.samples is None:
            return
        dtype = self.file.dtype or hidden.dtype
        stored = sum(row.numel() for row in given.rows(hidden)) * dtype.itemsize
        size = stored / len(given.keys) * self.samples
        place = next(one for one in (self.file.directory, *self.file.directory.parents) if one.exists())
        free = shutil.disk_usage(place).free + self.file.end
        if ROOM * size > free:
            raise PrefixRefused(f"about {1e-9 * size:.3g} GB are needed, and {1e-9 * free:.3g} GB are free at {place}")
        self.tell(
            f"training.store_prefix: {len(self.below)} of {self.of} blocks lie below the lowest adapted one; about "
            f"{1e-9 * size:.3g} GB of their activations ({str(dtype).removeprefix('torch.')}) are stored in "
            f"{self.file.directory} in the first epoch, and the blocks are skipped from then on"
        )

    def _verify(self, args: Any, kwargs: dict[str, Any], given: Given, found: torch.Tensor) -> None:
        """Raise PrefixRefused where a full pass does not give what is stored, and the loss that comes of it."""
        coarse = self.file.dtype is not None and self.file.dtype != found.dtype
        full, _ = _hidden(self._probe(args, kwargs, seed=1))
        if not _alike(full, found, given, coarse=coarse):
            raise PrefixRefused("the activations of a sample differ from those of the first epoch")
        outputs = [self._whole(args, kwargs, using) for using in (None, found)]
        losses: list[Any] = [getattr(output, "loss", None) for output in outputs]
        if all(isinstance(loss, torch.Tensor) for loss in losses):
            one, other = (loss.detach().float().mean().reshape(1) for loss in losses)
            if not _near(one, other, coarse=coarse or found.dtype not in TOLERANCE):
                raise PrefixRefused(
                    f"the loss from stored activations is {float(other):g}, and {float(one):g} without: something "
                    "bypasses the blocks"
                )
        self._verified = True

    def _whole(self, args: Any, kwargs: dict[str, Any], using: torch.Tensor | None) -> Any:
        """A forward pass of the whole model, with these activations in the place of the blocks below."""
        self._probing, self._using = True, using
        try:
            with torch.no_grad(), torch.random.fork_rng():
                torch.manual_seed(1)
                self._calls = -1  # a full pass is no fault, and nothing is stored of it
                return self.model(*args, **kwargs)
        finally:
            self._probing, self._using, self._calls = False, None, 0

    def _probe(self, args: Any, kwargs: Mapping[str, Any], seed: int) -> Any:
        """What the last block below gives, with this random state; random states are as they were after it."""
        self._probing = True
        try:
            with torch.no_grad(), torch.random.fork_rng():
                torch.manual_seed(seed)
                self.model(*args, **kwargs)
        except _Stop as stop:
            return stop.output
        except Exception as error:  # of a pass that is tried alone: the real one will tell of itself
            raise PrefixRefused(f"a trial forward pass fails ({type(error).__name__}: {error})") from error
        finally:
            self._probing = False
        raise PrefixRefused("the block below the lowest adapted block does not run")

    def _forward_of(self, block: torch.nn.Module, *, last: bool) -> Callable[..., Any]:
        original = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._using is not None:
                return self._wrap(self._using if last else _first_tensor(args, kwargs))
            output = original(*args, **kwargs)
            if not last:
                return output
            if self._probing and self._calls != -1:
                raise _Stop(output)
            if self._recording is not None:
                self._record(output)
                if self._filling:
                    raise _Stop(output)
            return output

        return forward

    def _record(self, output: Any) -> None:
        assert self._recording is not None
        self._calls += 1
        try:
            if self._calls > 1:
                raise PrefixRefused("a block below runs several times in a forward pass")
            self.file.add(self._recording, _hidden(output)[0])
        except PrefixRefused as refused:
            self._refuse(str(refused))
        except OSError as error:
            if self.required:
                raise cannot_write(self.file.path, error) from error
            self._refuse(f"{self.file.path} cannot be written: {error.strerror}")


@contextmanager
def maybe(prefix: StoredPrefix | None) -> Iterator[None]:
    """While open, the prefix stores and is used, if there is one."""
    if prefix is None:
        yield
        return
    with prefix:
        yield


def _below(model: torch.nn.Module) -> tuple[list[torch.nn.Module], int]:
    """The blocks below the lowest one with something that trains, in the stack that has it, and how many it has.

    Raises:
        PrefixRefused: there are none, or several stacks train.
    """
    base = base_of(model)
    trained = {name for name, parameter in base.named_parameters() if parameter.requires_grad} | set(
        injected_sizes(base)
    )
    stacks: dict[str, list[str]] = {}
    for block in blocks_of(base):
        stacks.setdefault(block.rpartition(".")[0], []).append(block)
    adapted = {
        stack: [any(name.startswith(f"{block}.") or name == block for name in trained) for block in blocks]
        for stack, blocks in stacks.items()
    }
    adapted = {stack: flags for stack, flags in adapted.items() if any(flags)}
    if not adapted:
        raise PrefixRefused("no block of the model is adapted")
    if len(adapted) > 1:
        raise PrefixRefused(f"blocks of several stacks are adapted ({', '.join(adapted)})")
    stack, flags = next(iter(adapted.items()))
    lowest = flags.index(True)
    if not lowest:
        raise PrefixRefused(f"{stacks[stack][0]}, the lowest block, is adapted")
    return [base.get_submodule(name) for name in stacks[stack][:lowest]], len(stacks[stack])


def _hidden(output: Any) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """The hidden states that a block passes on, and from hidden states to such an output.

    Raises:
        PrefixRefused: it passes on more.
    """
    if isinstance(output, torch.Tensor):
        return output, lambda hidden: hidden
    if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor) and not any(
        each is not None for each in output[1:]
    ):  # fmt: skip
        rest = output[1:]
        return output[0], lambda hidden: (hidden, *rest)
    raise PrefixRefused("its blocks pass on more than hidden states")


def _first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    hidden = kwargs.get("hidden_states")
    candidates = [hidden, *args, *kwargs.values()]
    found: torch.Tensor = next(each for each in candidates if isinstance(each, torch.Tensor))
    return found


def _alike(one: torch.Tensor, other: torch.Tensor, given: Given, *, coarse: bool = False) -> bool:
    """Whether two are the same but for rounding where no padding is."""
    pairs = zip(given.rows(one), given.rows(other), strict=True)
    return all(_near(mine, theirs, coarse=coarse) for mine, theirs in pairs)


def _near(one: torch.Tensor, other: torch.Tensor, *, coarse: bool = False) -> bool:
    if one.shape != other.shape:
        return False
    tolerance = COARSE if coarse else TOLERANCE.get(one.dtype, COARSE)
    size = float(one.abs().max()) if one.numel() else 0.0
    return one.numel() == 0 or float((one.float() - other.float()).abs().max()) <= tolerance * max(size, 1e-30)


def _in_evaluation_mode(module: torch.nn.Module, args: Any) -> None:
    module.training = False
