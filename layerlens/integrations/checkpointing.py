"""Activation checkpointing of chosen blocks in a transformers model."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ManifestError
from layerlens.integrations.transformers import blocks_to_checkpoint

if TYPE_CHECKING:
    import torch


def checkpoint_blocks(model: torch.nn.Module, names: Collection[str]) -> None:
    """Checkpoint the activations of these blocks, and of no others, in training mode.

    Not in the reentrant way, so that the backward pass ends at the lowest adapted layer.

    Args:
        model: a transformers model, or one with layers of PEFT in it.
        names: of ``blocks_to_checkpoint`` of the base model.

    Raises:
        ManifestError: the model has no such block; nothing is changed then.
    """
    from torch.utils.checkpoint import checkpoint

    blocks = {name.removeprefix("base_model.model."): block for name, block in blocks_to_checkpoint(model).items()}
    unknown = [name for name in names if name not in blocks]
    if unknown:
        raise ManifestError(
            f"checkpointed: {unknown[0]} is not a block of this model that can be checkpointed (its blocks: "
            f"{', '.join(list(blocks)[:4]) or 'none'}{' ...' if len(blocks) > 4 else ''})"
        )
    for name, block in blocks.items():
        each: Any = block
        each.gradient_checkpointing = name in names
        if name in names:
            each._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
