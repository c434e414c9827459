"""``ModelSource``: the interface of a source of models, and the function that loads a model from any source."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ModelSpecError
from layerlens.registry import TASKS, source_of

if TYPE_CHECKING:
    import torch

    from layerlens.integrations.pretrained import PretrainedModel
    from layerlens.models.tokens import TokenRequest, TokenTraining


@dataclass(frozen=True)
class LoadRequest:
    """A request to load a model.

    Args:
        reference: name of the model: ``PREFIX:PLACE``, a directory or a hub name.
        task: name of the task to load it for.
        labels: names of the classes, if the task has classes. For speech, the letters that a vocabulary can be made of.
        seed: random seed of a new head.
        base_dir: folder that relative paths start from; by default, the working directory.
        dtype: precision of the weights: "float32", "bfloat16" or "float16".
        weights: the configured ``model.weights``, for sources that load weights from another place.
        placement: see ``placement_arguments``; only for models of transformers.
        streamed: leave the weights on disk (see ``load_skeleton``).
        trust_remote_code: allow Python code beside the weights to run; only for models of transformers.
        quantization: arguments of the quantization configuration of transformers; None: load the weights as saved.
        tokens: embedding rows that are added or trained; None if the embeddings do not change.
        heads: patterns of the modules that are trained in full; None if the user does not set them.
        new_head: True: ``labels`` replace those of a trained head. None: they do, unless they are the same.
    """

    reference: str
    task: str = ""
    labels: Sequence[str] = ()
    seed: int = 0
    base_dir: Path | None = None
    dtype: str = "float32"
    weights: str | None = None
    placement: Mapping[str, Any] | None = None
    streamed: bool = False
    new_head: bool | None = None
    heads: Sequence[str] | None = None
    trust_remote_code: bool = False
    quantization: Mapping[str, Any] | None = None
    tokens: TokenRequest | TokenTraining | None = None

    @property
    def source(self) -> ModelSource:
        """The source of the model."""
        source: ModelSource = source_of(self.reference)[0]
        return source

    @property
    def kind(self) -> Any:
        """The ``layerlens.tasks.Task`` of this name; None where there is none."""
        return TASKS.get(self.task)

    @property
    def place(self) -> str:
        """The reference without its prefix."""
        return source_of(self.reference)[1]


@dataclass(frozen=True)
class Trust:
    """What loading a model reads or runs, which the operator of a server must have allowed.

    Args:
        path: file, folder or URL to read; "" for none.
        hub: True if the model may come from the Hugging Face hub. If ``path`` is set too, only if the path is missing.
        pickle: True if the weights are a pickle file, which can run code.
        package: installed package to import; "" if only libraries of LayerLens are imported.
        code: module that the reference names, and of which LayerLens calls a function; "" for none.
    """

    path: str = ""
    hub: bool = False
    pickle: bool = False
    package: str = ""
    code: str = ""


class ModelSource(ABC):
    """A source of models. ``layerlens.registry.SOURCES`` lists each source under its prefix.

    A subclass sets the attributes that differ from these defaults, and implements ``load``.
    """

    key = "name_or_path"
    """Key of the configuration's section ``model`` that may name it; another one than the default is the only one."""
    default_task = ""
    """What its models are for; "" if the user must say it."""
    purpose = "is for other tasks"
    """What its models do, for the message that refuses a task."""
    dtypes: tuple[str, ...] = ()
    """Precisions that its models can be profiled in; empty for any."""
    takes_weights = False
    """Whether ``model.weights`` says where the weights are."""
    of_transformers = False
    """Whether transformers' ``from_pretrained`` loads it: accelerate can place it, and an adapter needs only PEFT."""
    built_by = "your code"
    """Who builds the model in memory, so that its weights cannot stay on disk; "" where they can."""
    why_not_sharded = ""
    """Why FSDP2 cannot spread its models over processes; "" where it can."""

    @abstractmethod
    def load(self, request: LoadRequest) -> PretrainedModel:
        """The model, frozen, in evaluation mode and in ``request.dtype``; the caller's random state is left alone.

        Raises:
            ModelNotFoundError: it cannot be found or read.
            ModelSpecError: it cannot be had as it is wanted.
        """

    def architectures(self, request: LoadRequest) -> tuple[str, ...]:
        """Names of the classes that the model was saved from; none if it is not given.

        Raises:
            ModelNotFoundError: the model cannot be found or read.
        """
        return ()

    def without_weights(self, request: LoadRequest) -> PretrainedModel:
        """The model on the meta device, from its configuration alone: shapes, no numbers, and no tokenizer.

        Raises:
            ModelNotFoundError: its configuration cannot be found or read.
            ModelSpecError: it has none that tells its shapes, or cannot be had as it is wanted.
        """
        raise ModelSpecError(
            f"model.name_or_path: {request.reference} is built in memory by {self.built_by}, not from a configuration "
            "with its shapes; give a transformers model's directory or config.json"
        )

    def fits(self, kind: Any) -> bool:
        """Whether its models, where they have a ``default_task``, can be used for this ``layerlens.tasks.Task``."""
        return True

    def why_not_for(self, reference: str, task: str) -> str:
        """Why the model cannot be used for the task of this name; "" where it can."""
        if not self.default_task or not task or self.fits(TASKS[task]):
            return ""
        return f"model.task: {reference} {self.purpose}; set model.task: {self.default_task}"

    def why_not_in(self, reference: str, dtype: str) -> str:
        """Why the model cannot be profiled in this precision; "" where it can."""
        if not self.dtypes or dtype in self.dtypes:
            return ""
        return f"model.dtype: {reference} is profiled in {' or '.join(self.dtypes)} only, got {dtype}"

    def trust(self, request: LoadRequest) -> Trust:
        """What loading it reads or runs; of a source that does not say: the package that the source itself is in."""
        return Trust(package=type(self).__module__.partition(".")[0])

    def resolve(self, request: LoadRequest) -> str:
        """What other tools load the model by: a local directory or a hub name where there is one.

        Raises:
            ModelNotFoundError: it cannot be found.
        """
        return request.reference

    def description(self, request: LoadRequest) -> Mapping[str, Any]:
        """What the model's ``config.json`` says, without its weights; empty where there is none.

        Raises:
            ModelNotFoundError: the model cannot be found, or the file not be read.
        """
        return {}

    def snippet(self, request: LoadRequest) -> tuple[list[str], str]:
        """Python imports, and the expression that loads the model without LayerLens."""
        return [], f"...  # your model: {request.reference}"

    def why_not_streamable(self, reference: str) -> str:
        """Why the weights cannot be left on disk; "" where nothing in the reference speaks against it."""
        if not self.built_by:
            return ""
        return (
            f"{reference} is built in memory by {self.built_by}, so it cannot be streamed; use plain, or a directory "
            "that transformers' save_pretrained wrote"
        )


def load_pretrained(name_or_path: str, task: str, labels: Sequence[str], **settings: Any) -> PretrainedModel:
    """Load a model and its tokenizer or image processor for ``task``, frozen, and in evaluation mode.

    A task head that the checkpoint lacks (or has for another number of labels) is initialised from ``seed``; the
    caller's random state is left alone.

    Args:
        name_or_path, task, labels, settings: the fields of ``LoadRequest``.

    Raises:
        ModelNotFoundError: the model cannot be found or read.
        ModelSpecError: it cannot be streamed, or not be used for this task.
    """
    from layerlens.integrations.named_heads import with_heads
    from layerlens.integrations.torchvision_import import make_torchvision_importable

    request = LoadRequest(name_or_path, task, labels, **settings)
    source = request.source
    if labels and request.kind is not None and request.kind.vocabulary_head and not source.of_transformers:
        request = replace(request, labels=())  # whoever builds the model brings its vocabulary
    if request.streamed and (reason := source.why_not_streamable(name_or_path)):
        raise ModelSpecError(f"profiling.memory_mode: {reason}")
    for reason in (source.why_not_for(name_or_path, task), source.why_not_in(name_or_path, request.dtype)):
        if reason:
            raise ModelSpecError(reason)
    make_torchvision_importable()
    return with_heads(source.load(request), request.heads, built_here=source.built_by == ModelSource.built_by)


def load_model(name_or_path: str, task: str, labels: Sequence[str], **settings: Any) -> torch.nn.Module:
    """The model alone, as ``load_pretrained`` loads it."""
    return load_pretrained(name_or_path, task, labels, **settings).model
