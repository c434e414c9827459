"""Which class of transformers loads a checkpoint for a task: the task's own, or that of a model with several towers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerlens.exceptions import ModelNotFoundError

TEXT, BASE = "AutoModelForCausalLM", "AutoModel"
TOWERS = {
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
}
"""Where transformers has language models with towers for images, sound or video, and its table of their classes."""
ENCODERS_ALONE = ("t5", "mt5", "umt5")
"""Types whose embeddings are of the encoder alone."""


def auto_class_for(auto_class: str, model_type: str, architectures: Sequence[str] | None = None) -> str:
    """The name of the class that loads a model of this type where its task asks for ``auto_class``.

    A language model with other towers is loaded whole, as the class that it was saved from, so that its layers have
    the names of its checkpoint.

    Args:
        auto_class: of the task.
        model_type, architectures: what the checkpoint's configuration says.
    """
    if auto_class == BASE and model_type in ENCODERS_ALONE:
        return "AutoModelForTextEncoding"
    if auto_class not in (TEXT, *TOWERS):
        return auto_class
    tables = {TEXT: _classes("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", model_type)}
    tables |= {name: _classes(table, model_type) for name, table in TOWERS.items()}
    saved = set(architectures or ())
    return next(
        (name for name, known in tables.items() if saved & known), next((x for x in tables if tables[x]), auto_class)
    )


def preprocessor(auto_class: str, what: str, path: str, told: Mapping[str, Any]) -> Any:
    """What makes a checkpoint's inputs of images or sound, loaded by transformers' class of that name.

    Args:
        auto_class: "AutoImageProcessor" or "AutoFeatureExtractor".
        what: it is, as messages call it.
        path: of the checkpoint.
        told: further arguments of ``from_pretrained``.

    Raises:
        ModelNotFoundError: the checkpoint has none that can be used.
    """
    import transformers

    try:
        return getattr(transformers, auto_class).from_pretrained(path, **told)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelNotFoundError(
            f"model.name_or_path: {path} has no usable {what} ({str(error).strip().splitlines()[0]}); save the model's "
            "own beside its weights (preprocessor_config.json)"
        ) from error


def model_class(auto_class: str, config: Any) -> Any:
    """The class itself, for a configuration of transformers."""
    import transformers

    if auto_class in (getattr(config, "auto_map", None) or {}):  # code beside the weights says it
        return getattr(transformers, auto_class)
    name = auto_class_for(auto_class, config.model_type, getattr(config, "architectures", None))
    return getattr(transformers, name)


def auto_class_of(model: Any) -> str:
    """The name of the class that loads a language model in memory again from its checkpoint."""
    return auto_class_for(TEXT, getattr(model.config, "model_type", ""), [type(model).__name__])


def has_towers(auto_class: str, config: Any) -> bool:
    """Whether the model of a task is a language model that may have towers for other inputs than text."""
    return auto_class in (TEXT, *TOWERS) and any(_classes(table, config.model_type) for table in TOWERS.values())


def _classes(table: str, model_type: str) -> set[str]:
    from transformers.models.auto import modeling_auto

    found = getattr(modeling_auto, table, {}).get(model_type, ())
    return {found} if isinstance(found, str) else set(found)
