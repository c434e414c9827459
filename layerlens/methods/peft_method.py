"""Methods that Hugging Face PEFT puts into a model and keeps on disk: a configuration and the tensors it begins with.

A PEFT adapter directory holds one kind of adapter, so a choice has one of these methods at most
(``Choice.peft_method``), beside methods that add modules of their own, and copies of modules that are trained in full
(``joins``). Each layer that gets it is a full name in
``target_modules``.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ManifestError
from layerlens.integrations.peft import base_of, copied_tensors, shared_fields
from layerlens.integrations.torch_modules import find_module
from layerlens.methods.method import Method
from layerlens.models import Choice, LayerSpec, Option

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig


class PeftMethod(Method):
    """A method of PEFT.

    Attributes:
        peft_type: what adapter_config.json calls it.
        peft_config: the name of its configuration class in PEFT.
    """

    wraps = mergeable = True
    peft_type: str
    peft_config: str

    @abstractmethod
    def why_not(self, name: str, module: Any) -> str:
        """Why PEFT cannot put it on this module; "" where it can."""

    def module_of(self, model: torch.nn.Module, option: Option) -> torch.nn.Module:
        """The module that ``option`` is for.

        Raises:
            ManifestError: there is none, or it cannot take the method.
        """
        module = find_module(model, option.layer)
        if reason := self.why_not(option.layer, module):
            raise ManifestError(f"{option.layer}: {reason}")
        return module

    @abstractmethod
    def config(
        self, choice: Choice, model: torch.nn.Module, *, train_head: bool = True, base: str | None = None
    ) -> PeftConfig:
        """The PEFT configuration of the choice's options of this method.

        Args:
            choice: has at least one of them.
            model: the base model, for its module names and shapes; it is not changed.
            train_head: let PEFT train and save the task head too; see ``layerlens.integrations.peft.lora_config``.
            base: name or path of the base model, for the file.

        Raises:
            ManifestError: an unknown module, or one that cannot take the method.
        """

    @abstractmethod
    def tensors(
        self, choice: Choice, model: torch.nn.Module, factors: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """The tensors of adapter_model.safetensors before the first step, in which no output changes.

        Raises:
            ManifestError: an unknown module, one that cannot take the method, or weights that are not in memory.
        """

    def prepare(
        self, model: torch.nn.Module, choice: Choice, factors: Mapping[str, torch.Tensor] | None = None
    ) -> Callable[[torch.nn.Module], torch.nn.Module]:
        tensors = self.tensors(choice, model, factors)
        config: Any = self.config(choice, model)
        config.base_model_name_or_path = None  # PEFT fills in where this very model came from
        sizes = {option.layer: option.rank for option in choice.of_method(self.name)}
        return lambda frozen: self._wrapped(frozen, config, sizes, tensors)

    def remove(self, model: torch.nn.Module) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        base = base_of(model)
        if base is not model and any(isinstance(module, BaseTunerLayer) for module in base.modules()):
            _unload(model, base)

    def merge(self, model: torch.nn.Module) -> torch.nn.Module:
        """What was trained in the precision of the weights, and the trained task head in place.

        Warns of what rounding takes where the weights are quantized.
        """
        from layerlens.integrations.quantized_merge import merge_with_cost

        tuned: Any = model
        return merge_with_cost(tuned, tuned.merge_and_unload)

    def why_not_mergeable(self, model: torch.nn.Module) -> str:
        from layerlens.integrations.quantized_merge import why_not_merged

        return why_not_merged(model)

    def _wrapped(
        self, model: torch.nn.Module, config: Any, sizes: Mapping[str, int], tensors: Mapping[str, torch.Tensor]
    ) -> torch.nn.Module:
        """A PEFT model around ``model`` whose layers have these sizes and start from ``tensors``."""
        import torch
        from peft import get_peft_model

        from layerlens.integrations.peft_calls import take_keywords

        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # PEFT 0.21 still reads a name of gradient checkpointing that transformers 5.23 has renamed.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*base layer has no bias.*")  # merging says so too
            warnings.filterwarnings("ignore", message="Unsupported layer type.*")  # of norms: the copy is the norm
            # It looks for the ranks of parameters among modules.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern", category=RuntimeWarning)
            tuned = get_peft_model(model, config)  # draws weights of its own, which are replaced below
        if self.sizes_in(tuned) != sizes:
            missed = sorted(sizes.keys() - self.sizes_in(tuned).keys()) or sorted(sizes)
            raise ManifestError(
                f"PEFT did not give these layers their {self.unit}: {', '.join(missed)}; are they in the task head?"
            )
        take_keywords(tuned)
        places = {_in_file(name): parameter for name, parameter in tuned.named_parameters()}
        with torch.no_grad():
            for key, tensor in tensors.items():
                places[_in_file(key)].copy_(tensor)
        return tuned


class VectorMethod(PeftMethod):
    """A method of PEFT that has one size: a vector, or the copies of a module's own, for each layer.

    Attributes:
        holder: the attribute of PEFT's layers that holds its parameters.
    """

    holder: str

    @abstractmethod
    def layer_tensors(self, name: str, module: Any) -> dict[str, torch.Tensor]:
        """What its file has of one layer before the first step, by what follows the layer's name."""

    def takes_size(self, layer: LayerSpec, size: int) -> bool:
        return size == 1

    def marginal_params(self, layer: LayerSpec) -> int:
        return self.trainable_params(layer, 1)

    def matrix_shape(self, layer: LayerSpec) -> tuple[int, int, int]:
        return 1, self.trainable_params(layer, 1), 1

    def params_in(self, model: torch.nn.Module, option: Option) -> tuple[int, str]:
        module = self.module_of(model, option)
        count = sum(tensor.numel() for tensor in self.layer_tensors(option.layer, module).values())
        return count, f"{self.label} on this {type(module).__name__}"

    def config(
        self, choice: Choice, model: torch.nn.Module, *, train_head: bool = True, base: str | None = None
    ) -> PeftConfig:
        import peft

        names = [option.layer for option in choice.of_method(self.name)]
        for option in choice.of_method(self.name):
            self.module_of(model, option)
        fields = shared_fields(choice, model, names, train_head=train_head, base=base)
        made: PeftConfig = getattr(peft, self.peft_config)(**fields, **self.own_fields(model, names))
        return made

    def own_fields(self, model: torch.nn.Module, names: list[str]) -> dict[str, Any]:
        """What its configuration has beside the fields that all have; nothing unless redefined."""
        return {}

    def tensors(
        self, choice: Choice, model: torch.nn.Module, factors: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for option in choice.of_method(self.name):
            made = self.layer_tensors(option.layer, self.module_of(model, option))
            if self.starts_from_weights and any(tensor.is_meta for tensor in made.values()):
                raise ManifestError(f"{option.layer}: {self.label} starts from its weights, which are not in memory")
            found |= {f"base_model.model.{option.layer}.{end}": tensor for end, tensor in made.items()}
        return found | copied_tensors(choice, model)

    def sizes_in(self, model: torch.nn.Module) -> dict[str, int]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = {name: one for name, one in base_of(model).named_modules() if isinstance(one, BaseTunerLayer)}
        return {name: 1 for name, one in layers.items() if hasattr(one, self.holder) and one.active_adapters}


def _in_file(name: str) -> str:
    """A parameter of a PEFT model as its file calls it: without the adapter's name."""
    name = name.replace(".modules_to_save.default.", ".").replace(".default.", ".").removesuffix(".default")
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def _unload(model: Any, base: torch.nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise ManifestError(
                f"{name}: the trained change is merged into the weight, and removing it again would leave rounding "
                "errors; load the base model again"
            )
    originals = {
        name: module.original_module
        for name, module in base.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    model.unload()
    for name, original in originals.items():
        base.set_submodule(name, original)
