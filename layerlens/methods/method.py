"""``Method``: the interface of a PEFT method: names, counts, costs from shapes, and how it is added to a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ConfigurationError, ModelSpecError
from layerlens.models import NONE, Choice, LayerSpec, MethodStatistics, ModelSpec, Option
from layerlens.models.model_spec import LINEAR
from layerlens.registry import METHODS

if TYPE_CHECKING:
    import torch

INPUT, OUTPUT, QUERY = "input", "output", "query"
"""What a gradient matrix takes as its input: the layer's input h, its output y, or an attention block's queries."""


@dataclass(frozen=True)
class Operation:
    """The cost of one tensor operation per token, patch or pixel.

    Args:
        flops: matrix-product FLOPs per token (2 per multiply-add). Element-wise work counts as memory traffic and not
            as FLOPs, as in ``torch.utils.flop_counter``.
        elements: elements read and written per token.
        weights: elements read and written once per call.
        call_flops: matrix-product FLOPs per call, for any number of tokens.
    """

    flops: float
    elements: float
    weights: int = 0
    call_flops: float = 0.0


class Method(ABC):
    """One PEFT method.

    The size of an option is its ``rank``: LoRA's rank, an adapter's width, or the number of a prefix's pairs.

    Attributes:
        name: name in the registry, in configurations and in manifests.
        label, plural: name in reports, singular and plural.
        unit: unit of the size, such as "rank".
        letter: one capital letter for narrow tables.
        style: colour on a terminal, as ``rich`` names it.
        colours: colours in reports, on a light and on a dark page, as ``#rrggbb``.
        marker: marker in figures, as matplotlib names it.
        sizes_key: field of ``OptimizationConfig`` with the sizes to offer; "" if ``method_sizes`` has them.
        default_sizes: sizes to offer if ``method_sizes`` has no entry for the method.
        parameter_mark: text that the names of its parameters in a model contain, and no other names.
        reads: ``INPUT``, ``OUTPUT`` or ``QUERY``: the input of the gradient matrix that the method can change.
        absorbs_input_scale: True if a trained weight can compensate any scale of the input. The gradient energy is then
            compared at the scale of LoRA's input.
        on_request: True if it is measured and offered only when ``optimization.methods`` names it.
        starts_from_weights: True if its first values depend on the base model's weights, and not only on their shapes.
        joins: True if PEFT trains a copy of the layer's module, which can be in one directory with another method.
        wraps: True if ``prepare`` returns a model around the base model, which trains a copy of the task head.
        mergeable: True if the trained parameters can be merged into the base model's weights.
        parameter_tensors: number of tensors that it trains on a layer.
        views: number of operations in a step that move no data (views, expansions), in addition to three for each
            matrix product.
    """

    name: str
    label: str
    plural: str
    unit: str
    letter: str
    style: str = "green"
    colours: tuple[str, str] = ("#6639ba", "#bc8cff")
    marker: str = "D"
    sizes_key: str = ""
    default_sizes: tuple[int, ...] = (1,)
    parameter_mark: str
    reads: str = INPUT
    absorbs_input_scale: bool = False
    on_request: bool = False
    starts_from_weights: bool = False
    joins: bool = False
    wraps: bool = False
    mergeable: bool = False
    parameter_tensors: int = 1
    views: int = 0

    def takes(self, layer: LayerSpec, module: Any, adapter_sites: str) -> bool:
        """Whether ``module``, described by ``layer``, supports the method. By default, every Linear and Conv1D does.

        ``adapter_sites`` is ``profiling.adapter_sites``: "residual", or "all" for every layer.
        """
        return layer.layer_type == LINEAR

    def why_refused(self, layer: LayerSpec, module: Any) -> str:
        """The reason why the method is not offered on a layer whose kind supports it; "" if it is offered."""
        return ""

    def takes_size(self, layer: LayerSpec, size: int) -> bool:
        """Whether the layer supports this size."""
        return True

    def why_not_size(self, layer: LayerSpec, size: int) -> str:
        """The reason why the layer does not support a size that ``takes_size`` refuses."""
        return f"{self.label} takes no size {size} there"

    @abstractmethod
    def trainable_params(self, layer: LayerSpec, size: int) -> int:
        """Exact number of parameters that the method trains on the layer."""

    def marginal_params(self, layer: LayerSpec) -> int:
        """Number of parameters that one more unit of size adds."""
        return self.trainable_params(layer, 2) - self.trainable_params(layer, 1)

    @abstractmethod
    def operations(self, layer: LayerSpec, size: int) -> list[Operation]:
        """The operations that the method adds to the layer's forward pass."""

    @abstractmethod
    def kept_elements(self, layer: LayerSpec, size: int) -> float:
        """Elements per token that its backward pass needs and that the frozen model may not keep: an upper bound."""

    def kept_once(self, layer: LayerSpec, size: int) -> float:
        """Elements that it keeps for each call of the layer, however many tokens it has; none unless redefined."""
        return 0.0

    def kept_tensors(self, layer: LayerSpec) -> tuple[str, ...]:
        """``INPUT``, ``OUTPUT`` or ``QUERY`` where it keeps that tensor of the layer as it is: others may keep it too.

        Their elements are part of ``kept_elements``.
        """
        return ()

    def tensor_elements(self, layer: LayerSpec, tensor: str) -> float:
        """Elements per token of one of ``kept_tensors``."""
        return layer.inputs_per_position if tensor == INPUT else layer.n_out

    def backward(self, layer: LayerSpec, size: int) -> list[Operation]:
        """What it adds to the backward pass: of a product two, of its input and its weight; of other work as much."""
        return [step for step in self.operations(layer, size) for _ in range(2 if step.flops or step.call_flops else 1)]

    def passing(self, layer: LayerSpec, size: int) -> tuple[float, float, float]:
        """Elements per token that are alive for a moment, beside what is kept: at most so many.

        In its forward pass (its result, and the sum with the layer's own); in its backward pass, beside the gradient
        that arrives; and from then on until the frozen layer's own backward pass is done (the gradient of its input).
        """
        wide = float(max(layer.inputs_per_position, layer.n_out))
        return 2.0 * wide, wide, float(layer.inputs_per_position)

    def passing_once(self, layer: LayerSpec, size: int) -> float:
        """Elements that are alive for a moment in each call of the layer, however many tokens it has."""
        return 0.0

    def matrix_shape(self, layer: LayerSpec) -> tuple[int, int, int]:
        """(groups or experts, outputs, inputs) of the gradient matrix M = Σ_t d_t z_tᵀ that it can move."""
        return layer.experts, layer.n_out, layer.n_out if self.reads == OUTPUT else layer.n_in

    def gradient_operands(self, d__bgto: Any, z__bgti: Any) -> tuple[Any, Any]:
        """(d, z) of that matrix, from the output gradients and what it reads; as they are unless redefined.

        Both tensors are [batch, groups, tokens, features]: one group, or one for each head where it reads queries.
        """
        return d__bgto, z__bgti

    def layer_operands(self, layer: LayerSpec, module: Any, d__bgto: Any, h__bgti: Any, y: Any) -> tuple[Any, Any]:
        """(d, z) of one call of a layer's module, from its output gradients, input and output.

        Redefined where the gradient needs the module itself. The output is None where no method of the layer reads it.
        """
        return self.gradient_operands(d__bgto, y if self.reads == OUTPUT else h__bgti)

    def energy(self, layer: LayerSpec, size: int, measured: Mapping[str, MethodStatistics], name: str) -> float:
        """Gradient energy for each unit of size in the space of its own parameters, in LoRA's units.

        ``measured`` has the layer's statistics by method, ``name`` is "energy" or "signal". The factor that any LoRA
        has in that space is left out: of B at the start it is E‖M Aᵀ‖²(alpha/r)² = rank · ‖M‖² · (alpha/r)²/(3 n_in).
        """
        value: float = getattr(measured[self.name], name)
        return value

    def whitened_values(self, layer: LayerSpec, size: int, measured: Mapping[str, MethodStatistics]) -> Any:
        """The squared singular values of the whitened matrix that this size can move, as an array."""
        return measured[self.name].spectrum[: self.directions(layer, size)]

    def directions(self, layer: LayerSpec, size: int) -> int:
        """Singular directions of the matrix that this size can move."""
        return size * layer.experts

    @abstractmethod
    def params_in(self, model: torch.nn.Module, option: Option) -> tuple[int, str]:
        """Parameters that the option trains in this very model, and what it is on, in the words of a message.

        Raises:
            ManifestError: the layer's module cannot take it.
        """

    @abstractmethod
    def prepare(
        self, model: torch.nn.Module, choice: Choice, factors: Mapping[str, torch.Tensor] | None = None
    ) -> Callable[[torch.nn.Module], torch.nn.Module]:
        """Check this method's options against the base model, which is not changed, and make their weights.

        Args:
            model: the base model.
            choice: at least one option is of this method.
            factors: LoRA's first A by layer, where it begins from what was measured.

        Returns:
            puts everything into the frozen base model, trainable and with no change of its outputs, and returns the
            model to train.

        Raises:
            ManifestError: an option does not fit the model.
        """

    @abstractmethod
    def sizes_in(self, model: torch.nn.Module) -> dict[str, int]:
        """Size on every layer of ``model`` that has the method, by the layer's name in the base model."""

    @abstractmethod
    def remove(self, model: torch.nn.Module) -> None:
        """Take it out of ``model``, which ``prepare`` or loading put it into; the base model computes as before.

        Raises:
            ManifestError: it cannot be taken out.
        """

    def why_not_mergeable(self, model: torch.nn.Module) -> str:
        """Why ``merge`` would not give what was trained, with the layer; "" where it would."""
        return ""

    def merge(self, model: torch.nn.Module) -> torch.nn.Module:
        """``model`` with what was trained in its weights; called where ``mergeable`` and nothing speaks against it."""
        raise NotImplementedError(f"{self.name} cannot be merged")


def sums_over_tokens(d__bgto: Any, factors__bgto: Any = None) -> tuple[Any, Any]:
    """(d ∘ factors, 1): operands of a matrix with one column, the gradient of a vector that acts feature by feature."""
    import torch

    wide = torch.promote_types(d__bgto.dtype, torch.float32)
    product = d__bgto.to(wide)
    if factors__bgto is not None:
        product = product * factors__bgto.to(wide)
    return product, torch.ones(*product.shape[:-1], 1, dtype=wide, device=product.device)


def method_of(name: str) -> Method:
    """The method of this name.

    Raises:
        ModelSpecError: it is not known.
    """
    try:
        found: Method = METHODS[name]
    except ConfigurationError as error:
        raise ModelSpecError(f"unknown method {name!r}; known: {', '.join((NONE, *METHODS))}") from error
    return found


def trainable_params(layer: LayerSpec, method: str, rank: int) -> int:
    """Parameters that ``method`` with ``rank`` trains on ``layer`` (exact); 0 for "none"."""
    return 0 if method == NONE else method_of(method).trainable_params(layer, rank)


def enumerate_options(spec: ModelSpec, ranks: Mapping[str, Sequence[int]]) -> tuple[Option, ...]:
    """Every option of every layer, "none" first in each layer, methods in the order of METHODS, ranks ascending.

    ``ranks`` maps a method to its allowed sizes; a method that is absent or empty is not offered, and no size that the
    layer cannot take (a grouped convolution takes the LoRA ranks that are multiples of its groups).
    """
    options = []
    for layer in spec.layers:
        options.append(Option(layer.name, NONE, 0))
        for name in METHODS:
            if name in layer.methods:
                sizes = [size for size in sorted(set(ranks.get(name, ()))) if METHODS[name].takes_size(layer, size)]
                options.extend(Option(layer.name, name, size) for size in sizes)
    return tuple(options)


def injected_sizes(model: torch.nn.Module) -> dict[str, tuple[str, int]]:
    """(method, size) of every layer of ``model`` that any method was put into, by its name in the base model."""
    return {layer: (name, size) for name in METHODS for layer, size in METHODS[name].sizes_in(model).items()}
