"""The decoder's inputs of an encoder-decoder whose batches have only labels, as most collators make them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn.functional import pad

from layerlens.integrations.audio_input import encoder_widths
from layerlens.tasks.losses import IGNORED
from layerlens.tasks.seq2seq import decoder_inputs

IDS, MASK, EMBEDDED = "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"


def with_decoder(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], labels: Any
) -> tuple[dict[str, torch.Tensor], Any]:
    """(inputs, labels) of a batch, with ``decoder_input_ids`` made from the labels where the model needs them.

    Such a model makes them itself where it gets the labels, but LayerLens calls it without, for its logits. If the
    decoder's tokens are as many as the encoder's, both are padded by one column, so that no activation's tokens can be
    taken for the other's. The loss stays the same, because the column has the label -100.

    Args:
        model: any model.
        inputs: by the model's arguments.
        labels: the targets, token ids [b, t] for a model that writes text.
    """
    if not _writes(model) or not _token_ids(labels) or EMBEDDED in inputs:
        return inputs, labels
    made = dict(inputs)
    room = getattr(model.config, "max_position_embeddings", None) or labels.shape[1] + 1
    alike = labels.shape[1] in _encoder_widths(model, inputs) and made.get(IDS, labels).shape == labels.shape
    if alike and labels.shape[1] < room:
        labels = pad(labels, (0, 1), value=IGNORED)
        if IDS in made:
            made[IDS] = pad(made[IDS], (0, 1), value=int(made[IDS][0, -1]))
        if MASK in made:
            made[MASK] = pad(made[MASK], (0, 1))
    if IDS not in made:
        made[IDS] = decoder_inputs(model, labels)
    if MASK not in made:
        made[MASK] = (labels != IGNORED).long()
    return made, labels


def _writes(model: torch.nn.Module) -> bool:
    """Whether it is an encoder-decoder of transformers that takes labels and its decoder's tokens."""
    taken = inspect.signature(model.forward).parameters
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)) and {"labels", IDS} <= set(taken)


def _token_ids(labels: Any) -> bool:
    return isinstance(labels, torch.Tensor) and labels.dim() == 2 and not labels.is_floating_point()


def _encoder_widths(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> set[int]:
    if "input_ids" in inputs:
        return {inputs["input_ids"].shape[1]}
    return set(encoder_widths(model, inputs))
