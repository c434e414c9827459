"""Models that a program gave as objects: ``object:CLASS`` names one in a manifest, and nobody can load it by that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerlens.exceptions import ModelNotFoundError
from layerlens.sources.source import LoadRequest, ModelSource

if TYPE_CHECKING:
    from layerlens.integrations.pretrained import PretrainedModel

PREFIX = "object"


class InMemorySource(ModelSource):
    """A module that was handed to ``layerlens.plan``; only the program that made it has it."""

    built_by = "your program"
    why_not_sharded = "a model passed as an object cannot be sharded over processes"

    def load(self, request: LoadRequest) -> PretrainedModel:
        raise ModelNotFoundError(
            f"{request.reference}: this model was given in memory and cannot be loaded; pass it again "
            "(layerlens.load(DIRECTORY).apply(model)), or name a saved one with --model"
        )


SOURCE = InMemorySource()
