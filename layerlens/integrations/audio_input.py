"""From samples of sound to what a model of transformers takes, and from its positions back to time.

Feature extractors differ: some take waves and pad them to the longest (wav2vec2, HuBERT, WavLM), some make spectrograms
of one length (AST, Whisper). Models without a mask of padding see how far a clip is padded: wav2vec2-base, and others
whose first layer is a group norm over time. Batches hold clips of like length, so that this is little.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from layerlens.exceptions import ModelNotFoundError
from layerlens.integrations.arguments import untaken
from layerlens.integrations.auto_classes import preprocessor
from layerlens.integrations.torch_modules import precision_of

if TYPE_CHECKING:
    import torch

WAVES, SPECTRA = "input_values", "input_features"
OF_SPECTRA = ("num_mel_bins", "n_fft", "hop_length")
"""What feature extractors that make spectrograms have; AST calls these ``input_values`` too."""
WINDOW_SECONDS = 0.025
"""Of a spectrogram: a shorter clip has none."""
USUAL_RATE, USUAL_SECONDS = 16_000, 10
"""What clips have where a model is known by its configuration alone."""


@dataclass(frozen=True)
class AudioInput:
    """The way from samples to inputs.

    Args:
        extractor: a feature extractor of transformers, or a function: arrays float32 [n] -> a tensor [batch, ...].
        rate: samples in a second that it wants.
        argument: the argument of ``forward`` that takes what a function makes.
    """

    extractor: Any
    rate: int = USUAL_RATE
    argument: str = WAVES

    def inputs(self, model: torch.nn.Module, clips: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """Clips as the inputs of the model, in its precision, with a mask of padding where it takes one."""
        import torch

        if not hasattr(self.extractor, "sampling_rate"):
            made: Mapping[str, Any] = {self.argument: torch.as_tensor(self.extractor(list(clips)))}
        else:
            made = self.extractor(list(clips), sampling_rate=self.rate, return_tensors="pt", **self._how(model, clips))
        dtype = precision_of(model)
        found = {name: x.to(dtype) if x.is_floating_point() else x for name, x in made.items()}
        return {name: found[name] for name in found if name not in untaken(model, found)}

    def _how(self, model: Any, clips: Sequence[np.ndarray]) -> dict[str, Any]:
        parameters = inspect.signature(self.extractor.__call__).parameters
        how: dict[str, Any] = {}
        if "padding" in parameters and parameters["padding"].default in (False, None, True):
            how["padding"] = True
            least = fewest_samples(model, masked_frames(model))
            if "max_length" in parameters and self._takes_waves and max(map(len, clips)) < least:
                how |= {"padding": "max_length", "max_length": least}
        if "return_attention_mask" in parameters and getattr(model.config, "feat_extract_norm", "") == "layer":
            how["return_attention_mask"] = True
        return how

    @property
    def _takes_waves(self) -> bool:
        return not any(hasattr(self.extractor, name) for name in OF_SPECTRA)

    @property
    def longest(self) -> float:
        """Seconds of a clip that the model sees, where its spectrograms have one length; else infinity."""
        if self._takes_waves:
            return math.inf
        own = getattr(self.extractor, "chunk_length", None)  # Whisper
        frames = getattr(self.extractor, "max_length", None)  # AST, a spectrum each 10 ms
        return float(own if own is not None else math.inf if frames is None else 0.01 * frames)

    def shortest(self, model: Any) -> int:
        """The fewest samples that a clip must have."""
        return max(1, fewest_samples(model, 1), 0 if self._takes_waves else round(WINDOW_SECONDS * self.rate))


def audio_input(extractor: Any, argument: str = WAVES) -> AudioInput:
    """The way into a model by its feature extractor."""
    return AudioInput(extractor, int(getattr(extractor, "sampling_rate", None) or USUAL_RATE), argument)


def load_audio_input(path: str, told: Mapping[str, Any]) -> AudioInput:
    """The way into a checkpoint of transformers.

    Raises:
        ModelNotFoundError: it has no feature extractor.
    """
    found = preprocessor("AutoFeatureExtractor", "feature extractor", path, told)
    if extractor_in(found) is None:
        raise ModelNotFoundError(
            f"model.name_or_path: the feature extractor of {path} ({type(found).__name__}) is not for audio: it has no "
            "sampling_rate"
        )
    return audio_input(found)


def extractor_in(processor: Any, model: Any = None) -> Any:
    """The feature extractor of sound in a processor, or the processor where it is one itself; None where there is none.

    Not of a language model that takes sound beside text.
    """
    if model is not None and getattr(model, "main_input_name", WAVES) not in (WAVES, SPECTRA):
        return None
    for one in (getattr(processor, "feature_extractor", None), processor):
        if hasattr(one, "sampling_rate") and hasattr(one, "model_input_names") and not hasattr(one, "tokenizer"):
            return one
    return None


def frames_of(model: Any, samples: int) -> int:
    """Positions that the model's convolutions make of so many samples (of waves or of frames of a spectrogram)."""
    lengths = getattr(model, "_get_feat_extract_output_lengths", None)
    return samples if lengths is None else max(0, int(lengths(_tensor(samples))))


def freeze_front(model: Any) -> None:
    """Let the convolutions of a model of waves keep no activations: in training they do otherwise, frozen or not."""
    if hasattr(model, "freeze_feature_encoder"):
        model.freeze_feature_encoder()


def positions_of(audio: AudioInput, model: Any, samples: int) -> int:
    """Positions of the model that a clip of so many samples has."""
    if getattr(getattr(model, "config", None), "conv_stride", None):
        return frames_of(model, samples)
    hop, stride = (int(getattr(audio.extractor, name, None) or 1) for name in ("hop_length", "stride"))
    hop = hop if hop > 1 else audio.rate // 100  # a spectrum each 10 ms
    return frames_of(model, samples // (hop * stride))


def _tensor(number: int) -> torch.Tensor:
    import torch

    return torch.tensor(number)


def fewest_samples(model: Any, frames: int) -> int:
    """The fewest samples of a wave that make so many positions; 0 where no convolution says it."""
    strides = getattr(getattr(model, "config", None), "conv_stride", None)
    kernels = getattr(getattr(model, "config", None), "conv_kernel", None)
    if not frames or not strides or not kernels or not hasattr(model, "_get_feat_extract_output_lengths"):
        return 0
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        frames = (frames - 1) * stride + kernel
    return int(frames)


def masked_frames(model: Any) -> int:
    """Positions that one mask of SpecAugment covers: in training, transformers refuses batches that have fewer."""
    config: Any = getattr(model, "config", None)
    on = getattr(config, "apply_spec_augment", False) and getattr(config, "mask_time_prob", 0.0) > 0
    return int(getattr(config, "mask_time_length", 0)) if on else 0


def mask_of_frames(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The mask [b, t] of a model's positions, int64, from the one of its samples; None where there is none."""
    import torch

    mask = inputs.get("attention_mask")
    if mask is None or not hasattr(model, "_get_feature_vector_attention_mask"):
        return None
    if not {WAVES, SPECTRA} & set(inputs):
        return None
    widths = {"add_adapter": False} if _adapts(model) else {}
    length = int(model._get_feat_extract_output_lengths(_tensor(mask.shape[1]), **widths))
    made: torch.Tensor = model._get_feature_vector_attention_mask(length, mask.to(torch.int64), **widths)
    return made.long()


def encoder_widths(model: Any, inputs: Mapping[str, torch.Tensor]) -> set[int]:
    """How many positions the encoder of sound may have for these inputs."""
    found = {int(getattr(getattr(model, "config", None), "max_source_positions", None) or 0)}
    mask = mask_of_frames(model, inputs)
    found |= set() if mask is None else {mask.shape[1]}
    for name in {WAVES, SPECTRA} & set(inputs):
        found |= {frames_of(model, size) for size in inputs[name].shape[1:]}
    return found


def _adapts(model: Any) -> bool:
    parameters = inspect.signature(model._get_feature_vector_attention_mask).parameters
    return "add_adapter" in parameters


def blank_inputs(config: Any, samples: int) -> dict[str, torch.Tensor]:
    """Inputs of a model that is known by its configuration alone: clips of ten seconds, or as long as it takes."""
    import torch

    bins = getattr(config, "num_mel_bins", None)
    if bins is None and getattr(config, "feature_projection_input_dim", None):  # wav2vec2-bert
        return {SPECTRA: torch.zeros(samples, 50 * USUAL_SECONDS, config.feature_projection_input_dim)}
    if bins is None:
        return {WAVES: torch.zeros(samples, USUAL_RATE * USUAL_SECONDS)}
    if getattr(config, "max_source_positions", None) and getattr(config, "model_type", "") == "whisper":
        return {SPECTRA: torch.zeros(samples, bins, 2 * config.max_source_positions)}
    if getattr(config, "patch_size", None):  # AST
        return {WAVES: torch.zeros(samples, getattr(config, "max_length", 1024), bins)}
    return {SPECTRA: torch.zeros(samples, 100 * USUAL_SECONDS, bins)}
