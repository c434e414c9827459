"""Which weights are in memory: those of one part of the model, and, being read by a thread, those of the next."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Weights(Protocol):
    """Where weights come from."""

    def read(self, name: str, out: torch.Tensor) -> None:
        """Fill ``out`` with the parameter of this name."""
        ...


class Residency:
    """Puts weights into a model of meta tensors and takes them out again; tied ones are read once and put everywhere.

    What is not in memory is NaN meanwhile, one number repeated: torch computes with a tensor on the meta device and
    one in main memory without complaint, and what it puts out is arbitrary.

    Args:
        model: its parameters on the meta device are the ones that are read; others stay as they are.
        weights: where they are.
        device: where they go.
    """

    def __init__(self, model: torch.nn.Module, weights: Weights, device: torch.device) -> None:
        self.model = model
        self.weights = weights
        self.device = device
        self.bytes_read = 0
        self.waited_s = 0.0
        self.reading_s = 0.0
        self._absent: dict[str, torch.nn.Parameter] = {}
        self._on_disk: dict[str, torch.nn.Parameter] = {}
        self._owners: dict[str, list[tuple[torch.nn.Module, str]]] = {}
        self._name_of: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if not parameter.is_meta:
                continue
            first = self._name_of.setdefault(id(parameter), name)
            path, _, attribute = name.rpartition(".")
            self._on_disk[first] = parameter
            self._owners.setdefault(first, []).append((model.get_submodule(path), attribute))
        for name, parameter in self._on_disk.items():
            nothing = torch.full((), float("nan"), dtype=parameter.dtype, device=device).expand(parameter.shape)
            self._absent[name] = torch.nn.Parameter(nothing, requires_grad=False)
            self._set(name, self._absent[name])
        self._inside = {name: _prefixes(model, owners) for name, owners in self._owners.items()}
        self._resident: set[str] = set()
        self._spare: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}
        shapes = Counter((x.shape, x.dtype) for x in self._absent.values())
        self._in_every_block = {shape for shape, count in shapes.items() if count > 2}  # embeddings and heads come once
        self._ahead: tuple[frozenset[str], Future[dict[str, torch.Tensor]]] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="layerlens-read-ahead")

    def names_in(self, paths: Iterable[str]) -> tuple[str, ...]:
        """Weights that are read, of these modules and everything in them."""
        wanted = tuple(paths)
        return tuple(
            name
            for name, owners in self._inside.items()
            if any(owner == path or owner.startswith(f"{path}.") for owner in owners for path in wanted)
        )

    def loose_names(self, parts: Sequence[str]) -> tuple[str, ...]:
        """Weights that belong to none of these modules: they are needed wherever the model's own forward pass runs."""
        inside = set(self.names_in(parts))
        return tuple(name for name in self._owners if name not in inside)

    @contextmanager
    def reads(self) -> Iterator[set[str]]:
        """Weights that anything computes with while this is open and that are not in memory then."""
        storages = {tensor.untyped_storage().data_ptr(): name for name, tensor in self._absent.items()}
        found: set[str] = set()
        with _Reads(storages, found):
            yield found

    def identity(self, name: str) -> str:
        """One name for all parameters that are tied to this one."""
        path, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(path)
        for first, owners in self._owners.items():
            if any(owner is module and of == attribute for owner, of in owners):
                return first
        return name

    def read_ahead(self, names: Iterable[str]) -> None:
        """Begin to read these; the next ``hold`` that wants them takes what was read."""
        if self._ahead is not None:
            return
        wanted = frozenset(names) - self._resident
        if wanted:
            self._ahead = wanted, self._thread.submit(self._read, sorted(wanted))

    def hold(self, names: Iterable[str]) -> None:
        """Have these in the model, whatever else is there."""
        missing = set(names) - self._resident
        start = time.perf_counter()
        if self._ahead is not None and missing:
            (names_ahead, ahead), self._ahead = self._ahead, None
            tensors = ahead.result()
            if names_ahead & missing:  # else an interrupted profile goes on elsewhere
                self._put(tensors)
                missing -= self._resident
        if missing:
            self._put(self._thread.submit(self._read, sorted(missing)).result())
        self.waited_s += time.perf_counter() - start

    def only(self, names: Iterable[str]) -> None:
        """Have these in the model and no others."""
        wanted = set(names)
        for name in self._resident - wanted:
            if self.device.type == "cpu":
                tensor = self._parameter(name).data
                if (tensor.shape, tensor.dtype) in self._in_every_block:
                    self._spare.setdefault((tensor.shape, tensor.dtype), []).append(tensor)
            self._set(name, self._absent[name])
        self._resident &= wanted
        self.hold(wanted)

    def let_go_of_spare_memory(self) -> None:
        """Free what was kept for weights of the same shapes."""
        self._spare.clear()

    def close(self) -> None:
        """Leave the model as it was, and end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        for name, parameter in self._on_disk.items():
            self._set(name, parameter)
        self._resident.clear()
        self._spare.clear()
        self._ahead = None

    def _read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        start = time.perf_counter()
        found = {}
        for name in names:
            like = self._absent[name]
            spare = self._spare.get((like.shape, like.dtype))
            tensor = spare.pop() if spare else torch.empty(like.shape, dtype=like.dtype)
            self.weights.read(name, tensor)
            self.bytes_read += tensor.nbytes
            found[name] = tensor.to(self.device)
        self.reading_s += time.perf_counter() - start
        return found

    def _put(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            self._set(name, torch.nn.Parameter(tensor, requires_grad=False))
        self._resident |= tensors.keys()

    def _set(self, name: str, parameter: torch.nn.Parameter) -> None:
        for module, attribute in self._owners[name]:
            module._parameters[attribute] = parameter

    def _parameter(self, name: str) -> torch.nn.Parameter:
        module, attribute = self._owners[name][0]
        found = module._parameters[attribute]
        assert found is not None
        return found


class _Reads(TorchDispatchMode):
    """Notes the names of tensors that operations get, by their storage."""

    def __init__(self, names: dict[int, str], found: set[str]) -> None:
        super().__init__()
        self.names = names
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                name = self.names.get(leaf.untyped_storage().data_ptr())
                if name is not None:
                    self.found.add(name)
        return func(*args, **(kwargs or {}))


def _prefixes(model: torch.nn.Module, owners: Sequence[tuple[torch.nn.Module, str]]) -> list[str]:
    """Paths of the modules that own a weight."""
    modules = {id(module) for module, _ in owners}
    return [path for path, module in model.named_modules(remove_duplicate=False) if id(module) in modules]
