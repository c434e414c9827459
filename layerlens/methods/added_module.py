"""Methods that add a small module of their own to the layers they adapt.

The module is a child of the layer's (``<layer>.layerlens_adapter``), so no module is renamed or replaced and the base
model's state dict keeps its keys. The child's name is also what its tensors are called on disk
(``tuning/storage.py``).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from layerlens.integrations.peft import base_of, name_seed
from layerlens.integrations.quantized import device_of
from layerlens.integrations.torch_modules import find_module
from layerlens.methods.method import Method
from layerlens.models import Choice, Option
from layerlens.registry import METHODS

if TYPE_CHECKING:
    import torch


CHILD_START = "layerlens_"
"""What the names of all added modules begin with."""


class AddedModule(Method):
    """A method whose layers get a module each; ``build`` makes it, and ``attach`` lets it act.

    Attributes:
        child: the module's name inside the layer's: ``layerlens_<name>``.
    """

    child: str = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "name"):
            cls.child = CHILD_START + cls.name.replace("-", "_")
            cls.parameter_mark = f".{cls.child}."

    @abstractmethod
    def build(
        self, model: torch.nn.Module, target: torch.nn.Module, layer: str, size: int, seed: int
    ) -> tuple[torch.nn.Module, str]:
        """The module for ``target`` at its zero step, in which it changes no output, and what shape it was made for.

        It has float32 parameters whatever the base model's precision, an attribute ``rank`` with its size, and depends
        on ``seed`` (which is the layer's own) and shapes only.

        Raises:
            ManifestError: the target cannot take the method.
        """

    def attach(self, model: torch.nn.Module, target: torch.nn.Module, added: torch.nn.Module) -> None:
        """Make ``added`` part of ``target``, on its device; the layer's output then goes through it, unless redefined.

        The module is called with the output and gives back what takes its place.
        """
        self._add_child(target, added)
        target.register_forward_hook(_through_added)

    def detach(self, model: torch.nn.Module, target: torch.nn.Module) -> None:
        """Undo ``attach``."""
        delattr(target, self.child)
        drop_hooks(target, _through_added)

    def new_module(self, model: torch.nn.Module, option: Option, seed: int) -> torch.nn.Module:
        """The module of ``option`` at its zero step, not yet attached to its layer of the base model.

        Args:
            model: the base model.
            option: one of this method.
            seed: seed of the whole choice.

        Raises:
            ManifestError: the layer's module cannot take the method.
        """
        return self._built(model, option, seed)[0]

    def params_in(self, model: torch.nn.Module, option: Option) -> tuple[int, str]:
        made, shape = self._built(model, option, seed=0)
        count = sum(parameter.numel() for parameter in made.parameters())
        return count, f"{self.name} {option.rank} on this module ({shape})"

    def prepare(
        self, model: torch.nn.Module, choice: Choice, factors: Mapping[str, torch.Tensor] | None = None
    ) -> Callable[[torch.nn.Module], torch.nn.Module]:
        options = choice.of_method(self.name)
        added = [(find_module(model, option.layer), self.new_module(model, option, choice.seed)) for option in options]

        def put(tuned: torch.nn.Module) -> torch.nn.Module:
            for target, module in added:
                self.attach(model, target, module)
            return tuned

        return put

    def modules_in(self, model: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """Every module of this method in ``model``, by the name of the layer it belongs to."""
        end = f".{self.child}"
        return {name.removesuffix(end): module for name, module in model.named_modules() if name.endswith(end)}

    def sizes_in(self, model: torch.nn.Module) -> dict[str, int]:
        added: dict[str, Any] = dict(self.modules_in(base_of(model)))
        return {layer: int(module.rank) for layer, module in added.items()}

    def remove(self, model: torch.nn.Module) -> None:
        base = base_of(model)
        for layer in self.modules_in(base):
            self.detach(base, base.get_submodule(layer))

    def _built(self, model: torch.nn.Module, option: Option, seed: int) -> tuple[torch.nn.Module, str]:
        target = find_module(model, option.layer)
        return self.build(model, target, option.layer, option.rank, name_seed(seed, option.layer))

    def _add_child(self, target: torch.nn.Module, added: torch.nn.Module) -> None:
        target.add_module(self.child, added.to(device_of(target)))


def added_methods() -> dict[str, AddedModule]:
    """Every method that adds modules, by name."""
    return {name: method for name in METHODS if isinstance(method := METHODS[name], AddedModule)}


def attached(model: torch.nn.Module) -> dict[str, tuple[str, torch.nn.Module]]:
    """(method, module) of every added module in ``model``, by the name of the layer it belongs to."""
    children = {f".{method.child}": name for name, method in added_methods().items()}
    found = {}
    for name, module in model.named_modules():
        for end, method in children.items():
            if name.endswith(end):
                found[name.removesuffix(end)] = (method, module)
    return found


def drop_hooks(module: torch.nn.Module, function: Callable[..., Any]) -> None:
    """Remove ``function`` from the forward hooks of ``module``; found by identity, so that copies of models work."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if hook is function]:
            del hooks[key]


def _through_added(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    for name, child in module.named_children():
        if name.startswith(CHILD_START):
            output = child(output)
    return output
