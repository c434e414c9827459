"""What loading a model gives, whatever source it comes from, and the fingerprint of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerlens.integrations.torch_modules import precision_of
from layerlens.integrations.transformers import new_modules
from layerlens.models.tokens import TokenTraining

if TYPE_CHECKING:
    import torch

    from layerlens.integrations.audio_input import AudioInput
    from layerlens.integrations.sentence_models import SentenceModel
    from layerlens.integrations.skeleton import StreamedWeights


@dataclass(frozen=True)
class ImageInput:
    """The way from images to pixels.

    Args:
        transform: from PIL images to float32 [batch, channels, height, width].
        argument: the argument of the model's ``forward`` that takes them.
        mode: PIL's mode that the images are converted to: "RGB", or "L" for models with one channel.
        processor: of transformers, which ``transform`` calls; None for another transform.
    """

    transform: Callable[[Sequence[Any]], torch.Tensor]
    argument: str = "pixel_values"
    mode: str = "RGB"
    processor: Any = None

    def inputs(self, model: torch.nn.Module, images: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Stored images as the input of the model, in its precision."""
        pixels = self.transform([image.open(self.mode) for image in images])
        return {self.argument: pixels.to(precision_of(model))}


@dataclass(frozen=True)
class PretrainedModel:
    """A loaded model and what loading it told.

    Args:
        model: in evaluation mode, every parameter frozen.
        tokenizer: the tokenizer saved with it; None for models of images.
        path: local directory or hub name it was loaded from.
        new_parameters: names of parameters that the checkpoint does not have and that are trained (a new task head).
        labels: the classes in the order of the model's outputs: the checkpoint's own order where it knows them all.
        images: how images become its inputs; None for models of texts.
        streamed: where the weights are, of a model on the meta device; None for a model that has them.
        processor: of transformers, how chats with images become its inputs; None for a model of one kind of input.
        no_processor: why the checkpoint's own cannot be loaded; "" where it can, or has none.
        drawn: names of other parameters that the checkpoint does not have; they keep their random initialisation.
        notes: what the user should know of how it was loaded, a line each.
        tokens: rows of the embeddings that are trained; None for none.
        audio: how sound becomes its inputs; None for models of anything else.
        sentence: what follows the transformer of a model of sentence-transformers that was given in memory.
        heads: modules that are trained in full because the user says so, in place of a task head that is not new; None
            where he says nothing.
    """

    model: torch.nn.Module
    tokenizer: Any
    path: str
    new_parameters: tuple[str, ...]
    labels: tuple[str, ...] = ()
    images: ImageInput | None = None
    streamed: StreamedWeights | None = None
    drawn: tuple[str, ...] = ()
    processor: Any = None
    notes: tuple[str, ...] = ()
    tokens: TokenTraining | None = None
    no_processor: str = ""
    heads: tuple[str, ...] | None = None
    audio: AudioInput | None = None
    sentence: SentenceModel | None = None

    @property
    def device(self) -> torch.device:
        """Where its inputs must be: main memory for a model without weights."""
        import torch

        device = next(self.model.parameters()).device
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def transforms(self) -> dict[str, Any]:
        """Functions, maybe of the user's, that make its inputs, by the name that messages use."""
        found = {"the transform of images": None if self.images is None else self.images.transform}
        own = self.audio is not None and not hasattr(self.audio.extractor, "sampling_rate")
        return found | ({"the transform of sound": self.audio.extractor} if self.audio and own else {})

    def trained_modules(self, task_head: bool = True) -> tuple[str, ...]:
        """Modules that are trained in full: those that the user names, and those that the checkpoint lacks.

        Args:
            task_head: whether a task head that is not new is trained, too, where the user names none.
        """
        named = self.heads or ()
        inside = tuple(f"{head}." for head in named)
        lacking = [name for name in self.new_parameters if not (inside and name.startswith(inside))]
        if not lacking and (self.heads is not None or not task_head):
            return named
        found = dict.fromkeys((*new_modules(self.model, lacking), *named))
        return tuple(name for name in found if not any(name.startswith(f"{outer}.") for outer in found))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of its weights without new ones, wherever they are; the same for both ways of loading a model."""
        heads = self.trained_modules() if self.new_parameters else ()
        leave_out = not_of_checkpoint(self.model, heads, self.drawn)
        if self.streamed is not None:
            return self.streamed.fingerprint(self.model, leave_out)
        return weights_fingerprint(self.model, leave_out, self.tokens)


def not_of_checkpoint(model: torch.nn.Module, heads: Sequence[str], drawn: Sequence[str] = ()) -> set[str]:
    """Names in the model's state that say nothing of which checkpoint it was loaded from.

    Args:
        model: as it was loaded.
        heads: modules that are trained in full because some of their parameters are new.
        drawn: other new parameters.
    """
    inside = tuple(f"{head}." for head in heads)
    return {name for name in model.state_dict() if name.startswith(inside)} | set(drawn)


def weights_fingerprint(
    model: torch.nn.Module, leave_out: Collection[str] = (), tokens: TokenTraining | None = None
) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the weights, without those in ``leave_out``.

    Tensors that were resized for new tokens are read as the checkpoint has them.
    """
    import torch

    from layerlens.integrations.placement import present
    from layerlens.integrations.quantized import stable_state

    digest = hashlib.sha256()
    shapes = tokens.checkpoint_shapes if tokens else {}
    for name, tensor in sorted(stable_state(model).items()):
        if name not in leave_out:
            parts = tuple(slice(size) for size in shapes.get(name, tensor.shape))
            digest.update(f"{name}:{tensor.dtype}:{tuple(shapes.get(name, tensor.shape))};".encode())
            flat = present(model, name, tensor)[parts].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(flat.numpy().data)
    return digest.hexdigest()


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer in a processor, or the tokenizer itself: with a padding token and the processor's chat template."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.pad_token is None:  # GPT-2 and Llama have none, and refuse batches without one
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = getattr(processor, "chat_template", None)
    return tokenizer


def mode_for(channels: int) -> str:
    """PIL's mode with this number of channels."""
    return {1: "L", 3: "RGB", 4: "RGBA"}.get(channels, "RGB")
