"""Rows of the embeddings that are trained beside what is chosen: tokens that the checkpoint does not know yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from layerlens.exceptions import ManifestError

ROWS, WHOLE = "trainable_token_indices", "modules_to_save"
"""How PEFT trains them: the rows alone, or the embedding (and the output layer) whole."""


@dataclass(frozen=True)
class TokenRequest:
    """What the section ``model`` of a configuration says of tokens.

    Args:
        resize: give every token of the tokenizer a row; those that the checkpoint lacks are trained.
        tokens: other tokens whose rows are trained.
        by: ``ROWS`` or ``WHOLE``.
    """

    resize: bool = False
    tokens: tuple[str, ...] = ()
    by: str = ROWS

    def __bool__(self) -> bool:
        return self.resize or bool(self.tokens)


@dataclass(frozen=True)
class TokenTraining:
    """Which rows of a model's embeddings are trained, and how.

    Args:
        by: ``ROWS`` or ``WHOLE``.
        rows: of the embedding, resized where that was asked for.
        features: of each row.
        indices: tokens whose rows are trained; with ``WHOLE`` all others are trained too.
        modules: the input embedding, and the output layer where it has a weight of its own.
        tied: the other modules that have the weight of the input embedding.
        params: parameters of ``modules``.
        checkpoint_shapes: name -> shape in the checkpoint, of the tensors that were resized.
    """

    by: str
    rows: int
    features: int
    indices: tuple[int, ...]
    modules: tuple[str, ...]
    tied: tuple[str, ...] = ()
    params: int = 0
    checkpoint_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> TokenTraining:
        """From what ``described`` says.

        Raises:
            ManifestError: a field is missing or of another kind.
        """
        known = {each.name for each in fields(cls)}
        try:
            given = {name: value for name, value in values.items() if name in known}
            shapes = {str(name): tuple(map(int, shape)) for name, shape in given.pop("checkpoint_shapes", {}).items()}
            lists: dict[str, Any] = {name: tuple(given.pop(name, ())) for name in ("indices", "modules", "tied")}
            found = cls(**given, **lists, checkpoint_shapes=shapes)
            sound = found.by in (ROWS, WHOLE) and found.modules and all(isinstance(x, str) for x in found.modules)
            sound = sound and all(type(x) is int and 0 <= x < found.rows for x in found.indices)
            sound = sound and all(type(x) is int and x > 0 for x in (found.rows, found.features))
        except (TypeError, ValueError, AttributeError) as error:
            raise ManifestError(f"model.tokens: does not say which rows are trained ({error})") from error
        if not sound:
            raise ManifestError(f"model.tokens: is not a description of trained rows, got {dict(values)!r}")
        return found

    def described(self) -> dict[str, Any]:
        """The same as JSON has it."""
        shapes = {name: list(shape) for name, shape in self.checkpoint_shapes.items()}
        lists = {name: list(getattr(self, name)) for name in ("indices", "modules", "tied")}
        return {
            "by": self.by, "rows": self.rows, "features": self.features, **lists, "params": self.params,
            "checkpoint_shapes": shapes,
        }  # fmt: skip

    @property
    def whole_modules(self) -> tuple[str, ...]:
        """Modules that are trained in full; none where rows are trained alone."""
        return self.modules if self.by == WHOLE else ()

    @property
    def peft_indices(self) -> dict[str, list[int]]:
        """``trainable_token_indices`` of a LoraConfig; empty where modules are trained in full."""
        return {name: list(self.indices) for name in self.modules} if self.by == ROWS else {}

    @property
    def trainable_params(self) -> int:
        """Numbers that are trained."""
        return self.params if self.by == WHOLE else len(self.modules) * len(self.indices) * self.features

    @property
    def has_output(self) -> bool:
        """Whether the output layer takes part."""
        return bool(self.tied) or len(self.modules) > 1

    def kept_elements(self, tokens: int) -> int:
        """Elements that are kept for the backward pass of a batch of so many tokens, which the frozen model does not.

        The output layer keeps its input, and PEFT's copy of its weight with the trained rows in it.
        """
        copy = self.rows * self.features if self.by == ROWS else 0
        return copy + self.features * tokens if self.has_output else 0
