"""A model by its shapes alone: built from its configuration, its layers listed, and its step counted without numbers.

What a run measures of the frozen model beside statistics (activations kept, FLOPs of a forward pass) depends on shapes
only. It is counted here by the same functions, on tensors without data, on the same kind of batch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from layerlens.exceptions import ConfigurationError, ModelSpecError
from layerlens.integrations.audio_input import blank_inputs
from layerlens.integrations.layers import model_spec, of_tokens_alone
from layerlens.integrations.pretrained import PretrainedModel, mode_for
from layerlens.integrations.quantized_loading import saved_quantization
from layerlens.integrations.quantized_sizes import quantized_sizes
from layerlens.integrations.torch_modules import frozen_without_dropout
from layerlens.integrations.transformers import blocks_of, longest_sequence, task_heads, without_cache
from layerlens.jobs.recorded_step import UNRECORDABLE, StepOf, recorded
from layerlens.models import Footprint, ModelSpec
from layerlens.models.step import StepRecord
from layerlens.models.tokens import TokenTraining
from layerlens.profiling.footprint import SAMPLES, frozen_footprint, without_data
from layerlens.sources import LoadRequest

USUAL_IMAGE = 224
"""Pixels of an image's side where neither an image processor nor the configuration says it."""


@dataclass(frozen=True)
class Shapes:
    """A model without numbers, and what is counted on it.

    Args:
        request: what it was built for.
        model: on the meta device.
        spec: its layers; without a fingerprint.
        footprint: of a step of the frozen model, for each token, or each sample where ``spec.per_sample``.
        counted_length: tokens of the sequences that it was counted on; 0 where there are none.
        stored: how the size of quantized weights is known, a sentence; "" where they are dense.
        unrecorded: why no training step could be recorded; "" where one is.
    """

    request: LoadRequest
    model: torch.nn.Module
    spec: ModelSpec
    footprint: Footprint
    counted_length: int
    stored: str = ""
    unrecorded: str = ""

    @property
    def head_params(self) -> int:
        """Parameters of a task head that is trained beside what is chosen; 0 where the model's own head stays."""
        names = task_heads(self.model) if self.request.kind.new_head else ()
        return sum(x.numel() for name in names for x in self.model.get_submodule(name).parameters())


def shapes_of(
    request: LoadRequest, sequence_length: int, *, adapter_sites: str = "residual", methods: Collection[str] = (),
    on_cpu: bool = True, step_length: int | None = None, only: Sequence[str] = (), tokens: TokenTraining | None = None,
) -> Shapes:  # fmt: skip
    """Build the model of ``request`` from its configuration and count a step on full batches.

    Args:
        request: the model, its task and the precision of its weights; weights are not looked for.
        sequence_length: tokens of the sequences that are counted; not read for models of images.
        adapter_sites, methods: see ``model_spec``.
        on_cpu: whether weights are for a CPU, on which some quantized ones are unpacked.
        step_length: tokens of the sequences of the recorded training step; ``sequence_length`` unless given.
        only: as ``profiling.layers``: patterns for the layers on offer; empty for all of the blocks.
        tokens: rows of the embeddings that are trained beside what is chosen.

    Raises:
        ModelNotFoundError: the configuration cannot be found or read.
        ModelSpecError: the model cannot be built from it, not for the task, or not be counted without its weights.
        ConfigurationError: the model takes no sequences so long.
    """
    pretrained = replace(request.source.without_weights(request), tokens=tokens)
    model: Any = pretrained.model
    if tokens is not None:
        model.resize_token_embeddings(tokens.rows, mean_resizing=False)
    limit = longest_sequence(model)
    if request.kind.inputs not in ("image", "audio") and limit is not None and sequence_length > limit:
        raise ConfigurationError(
            f"sequence_length: {sequence_length} tokens, but the model has {limit} positions; use at most {limit}"
        )
    try:
        with without_data(model), frozen_without_dropout(model, checkpointing=False), without_cache(model):
            inputs = _inputs(request, pretrained, sequence_length)
            per_sample = None if of_tokens_alone(inputs) else inputs
            spec = model_spec(
                pretrained,
                request.reference,
                adapter_sites=adapter_sites,
                inputs=per_sample,
                methods=methods,
                only=only,
                counted=True,
            )
            counted = frozen_footprint(model, next(iter(blocks_of(model)), None), inputs)
            heads = task_heads(model) if request.kind.new_head else ()
            heads += tokens.whole_modules if tokens else ()
            trained = _inputs(request, pretrained, step_length or sequence_length)
            of = StepOf(model, request.kind, trained, torch.zeros(SAMPLES, dtype=torch.int64), heads)
            step, unrecorded = _step(of, spec)
    except (RuntimeError, NotImplementedError) as error:  # what some models do by the values that they see
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelSpecError(
            f"model.name_or_path: {type(model).__name__} cannot be counted without its weights ({reason}); "
            "`layerlens run` measures it"
        ) from error
    spec, stored = _as_stored(request, pretrained, spec, on_cpu)
    length = 0 if spec.per_sample else sequence_length
    return Shapes(request, model, spec, Footprint(*counted, step), length, stored, unrecorded)


def _as_stored(
    request: LoadRequest, pretrained: PretrainedModel, spec: ModelSpec, on_cpu: bool
) -> tuple[ModelSpec, str]:
    """The model with the bytes of quantized weights as they are stored, and how these are known."""
    saved = saved_quantization(getattr(pretrained.model, "config", None))
    quantization = request.quantization or saved
    if not quantization:
        return spec, ""
    place = Path(pretrained.path)
    files = place if request.quantization is None and place.is_dir() else None
    heads = task_heads(pretrained.model) if request.kind.new_head else ()
    sizes = quantized_sizes(pretrained.model, quantization, spec.weight_bytes, files=files, spared=heads, on_cpu=on_cpu)
    return (spec if sizes.bytes is None else replace(spec, weight_bytes=sizes.bytes)), sizes.said


def _step(of: StepOf, spec: ModelSpec) -> tuple[StepRecord | None, str]:
    """A recorded training step; where the model cannot be recorded, None and the reason."""
    try:
        return recorded(of, spec), ""
    except UNRECORDABLE as error:
        return None, (str(error).strip().splitlines() or [type(error).__name__])[0]


def _inputs(request: LoadRequest, pretrained: PretrainedModel, sequence_length: int) -> dict[str, torch.Tensor]:
    """A full batch as a run counts it: token ids, images of the size that the model takes, or clips of ten seconds."""
    config: Any = getattr(pretrained.model, "config", None)
    tokens = torch.ones(SAMPLES, min(sequence_length, _longest_text(config) or sequence_length), dtype=torch.int64)
    if request.kind.inputs == "audio":
        decoded = {"decoder_input_ids": tokens} if getattr(config, "is_encoder_decoder", False) else {}
        return blank_inputs(config, SAMPLES) | (decoded if request.kind.tokens else {})
    if request.kind.inputs != "image":
        ids = torch.ones(SAMPLES, sequence_length, dtype=torch.int64)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return inputs | ({"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {})
    texts = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)} if request.kind.tokens else {}
    if pretrained.images is not None:
        return texts | {pretrained.images.argument: torch.zeros(SAMPLES, *_image_shape(pretrained))}
    own = getattr(config, "vision_config", None) or config
    size = getattr(own, "image_size", None) or USUAL_IMAGE
    sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    return texts | {"pixel_values": torch.zeros(SAMPLES, getattr(own, "num_channels", 3), *sides)}


def _longest_text(config: Any) -> int | None:
    """Tokens of the longest transcript or caption that a model takes; None where it does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(config, "max_target_positions", None) or getattr(text, "max_position_embeddings", None)
    return None if found is None else int(found)


def _image_shape(pretrained: PretrainedModel) -> tuple[int, ...]:
    """What the model's image processor makes of an image."""
    from PIL import Image
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    assert pretrained.images is not None
    config: Any = pretrained.model.config
    with unset_fake_temporarily():  # it works on numbers
        blank = Image.new(mode_for(getattr(config, "num_channels", 3)), (USUAL_IMAGE, USUAL_IMAGE))
        return tuple(pretrained.images.transform([blank]).shape[1:])
