"""A choice: the method and size of every layer, and everything else that is needed to add them to a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from layerlens.exceptions import ManifestError
from layerlens.models.facts import LoraSettings
from layerlens.models.model_spec import LORA, LORA_KINDS, NONE, ModelSpec, Option
from layerlens.models.tokens import ROWS, TokenTraining
from layerlens.registry import METHODS

ONE_KIND = "one PEFT adapter directory holds one kind of adapter (its peft_type, and one use_dora for all layers)"
ROWS_NEED_LORA = "in PEFT's configurations that of LoRA alone has rows of embeddings"


@dataclass(frozen=True)
class Choice:
    """One option for each layer, and how the new weights are initialised.

    Args:
        options: the options in the order of the model's layers. Layers that are not adapted may be listed with the
            method "none".
        seed: random seed of every new weight.
        lora: scale and initialisation of LoRA.
        head_modules: module paths of the task head, which is trained too.
        task: the task to tune for; "" if it does not matter.
        tokens: embedding rows that are trained too; None if there are none.
        checkpointed: module paths of the blocks with gradient checkpointing.
    """

    options: tuple[Option, ...]
    seed: int = 0
    lora: LoraSettings = field(default_factory=LoraSettings)
    head_modules: tuple[str, ...] = ()
    task: str = ""
    tokens: TokenTraining | None = None
    checkpointed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.lora.alpha_over_r is None and self.lora_options:
            raise ManifestError("lora.alpha_over_r: is missing; LoRA layers are scaled with it")

    @classmethod
    def of(cls, sizes: Mapping[str, tuple[str, int]], **fields: Any) -> Choice:
        """A choice from (method, size) by layer; ``fields`` are the others."""
        return cls(tuple(Option(layer, method, size) for layer, (method, size) in sizes.items()), **fields)

    @property
    def chosen(self) -> tuple[Option, ...]:
        """The options that adapt their layer."""
        return tuple(option for option in self.options if option.method != NONE)

    @property
    def lora_options(self) -> tuple[Option, ...]:
        """The options that a ``LoraConfig`` holds: LoRA or DoRA."""
        return tuple(option for option in self.options if option.method in LORA_KINDS)

    @property
    def peft_options(self) -> tuple[Option, ...]:
        """The options that PEFT adds to the model."""
        return tuple(option for option in self.chosen if METHODS[option.method].wraps)

    @property
    def peft_method(self) -> str:
        """The method of ``peft_options``, LoRA where only rows of embeddings are trained; "" where there is neither.

        Raises:
            ManifestError: there are several, or trained rows beside another method, which no PEFT adapter holds.
        """
        all_names = sorted({option.method for option in self.peft_options})
        names = [name for name in all_names if not METHODS[name].joins] or all_names
        if len(names) > 1:
            raise ManifestError(f"a choice cannot have {' and '.join(names)}: {ONE_KIND}")
        if not self.token_indices:
            return names[0] if names else ""
        if names and all(METHODS[name].joins for name in names):
            return LORA
        if names and names[0] not in LORA_KINDS:
            raise ManifestError(f"a choice cannot have {names[0]} and {ROWS}: {ROWS_NEED_LORA}")
        return names[0] if names else LORA

    @property
    def copied_options(self) -> tuple[Option, ...]:
        """The options whose modules PEFT trains as copies, beside the method that its directory is of."""
        return tuple(x for x in self.peft_options if METHODS[x.method].joins and x.method != self.peft_method)

    @property
    def token_indices(self) -> dict[str, list[int]]:
        """Rows that PEFT trains alone, by the module that they are of."""
        return {} if self.tokens is None else self.tokens.peft_indices

    @property
    def other_options(self) -> tuple[Option, ...]:
        """The options that PEFT does not support, for which LayerLens adds its own modules."""
        return tuple(option for option in self.chosen if not METHODS[option.method].wraps)

    def of_method(self, method: str) -> tuple[Option, ...]:
        """The options of one method."""
        return tuple(option for option in self.options if option.method == method)

    def lora_ranks(self) -> dict[str, int]:
        """LoRA or DoRA rank of each layer that has one, by module path."""
        return {option.layer: option.rank for option in self.lora_options}

    def trainable_params(self, spec: ModelSpec) -> int:
        """Number of parameters that the options train, without the task head."""
        layers = {layer.name: layer for layer in spec.layers}
        return sum(METHODS[one.method].trainable_params(layers[one.layer], one.rank) for one in self.chosen)

    def only(self, options: Iterable[Option]) -> Choice:
        """The same choice with other options."""
        return replace(self, options=tuple(options))

    def rows(self) -> list[list[Any]]:
        """[layer, method, size] of every layer that is adapted, as JSON has it: what two equal choices share."""
        return [[option.layer, option.method, option.rank] for option in self.chosen]
