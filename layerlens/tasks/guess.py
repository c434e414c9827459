"""Which task a model and its data are for, where nobody has said it.

The data's columns come first, since a model is tuned for what its data are. The checkpoint's class decides between
tasks that the data would do for, and rules out those whose head it lacks and that nobody could fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerlens.config import DataConfig, ModelConfig, RunConfig
from layerlens.data.load import BUILT_IN, BUILT_IN_PREFIX, first_rows, media_folder_of
from layerlens.data.table import Table
from layerlens.exceptions import ConfigurationError
from layerlens.integrations.auto_classes import BASE, TEXT, TOWERS
from layerlens.registry import TASKS
from layerlens.sources import LoadRequest
from layerlens.storage import url_of
from layerlens.tasks.image_classification import has_images

TOWER_CONFIGS = {"vision_config", "audio_config"}
"""What the ``config.json`` of a language model with other towers has beside the one of its text."""


@dataclass(frozen=True)
class Guess:
    """A task, and why it was taken."""

    task: str
    reason: str

    def __str__(self) -> str:
        return f"model.task: {self.task}, guessed from {self.reason}"


def task_of_class(class_name: str) -> str | None:
    """The task whose head a model class has, by the ending of its name; None where no task claims it.

    A class of single numbers (``ForSequenceClassification`` with one output) is identified by the data alone.

    >>> task_of_class("LlamaForCausalLM"), task_of_class("BertModel")
    ('causal-lm', None)
    """
    found = [(len(end), task.name) for task in TASKS.values() for end in task.endings if class_name.endswith(end)]
    longest = max((length for length, _ in found), default=0)
    return next((name for length, name in found if length == longest), None)


def guess_task(architectures: Sequence[str], table: Table, config: DataConfig) -> Guess:
    """The task of a model for these rows.

    Args:
        architectures: classes of the checkpoint, as its ``config.json`` has them; empty if it is not known.
        table: the first rows.
        config: the columns that are named.

    Raises:
        ConfigurationError: none or several tasks would do; names them.
        DataError: a column that is named is not there.
    """
    for key, given in config:
        if key.endswith("_column") and given is not None:
            for name in [given] if isinstance(given, str) else given:
                table.find(name, key, ())
    place = Path(table.place).name
    claims = {task.name: claim for task in TASKS.values() if task.claim and (claim := task.claim(table, config))}
    fitting = {name: claim for name, claim in claims.items() if possible(TASKS[name], architectures)}
    most = max((claim.columns for claim in fitting.values()), default=0)
    best = [name for name, claim in fitting.items() if claim.columns == most]
    of_model = [task for task in map(task_of_class, architectures) if task]
    if len(best) > 1:
        best = [name for name in best if name in of_model] or best
    if len(best) == 1:
        head = f", and {_listed(architectures)}" if best[0] in of_model else ""
        return Guess(best[0], f"{fitting[best[0]].why} of {place}{head}")
    if not claims and len(of_model) == 1:
        return Guess(of_model[0], _listed(architectures))
    found = "; ".join(f"{name} ({claim.why})" for name, claim in claims.items()) or ", ".join(table.columns)
    model = f", and the checkpoint is a {_listed(architectures)}" if architectures else ""
    raise ConfigurationError(
        f"model.task: cannot be guessed: {place} has {found}{model}; give --task or model.task, one of "
        f"{', '.join(TASKS)}"
    )


def with_task(config: RunConfig, base_dir: Path | None = None) -> tuple[RunConfig, Guess | None]:
    """The configuration with a task; and the guess, where it had none, or one that is another on images.

    Opens the model's ``config.json`` and the first rows of the data, nothing else. A function of the user that returns
    rows is called.

    Raises:
        ConfigurationError: none or several tasks would do.
        ModelNotFoundError, DataNotFoundError, DataError: there is no such model, no such data, or it cannot be read.
    """
    guess = _on_images(config.model.task, config.data, base_dir) if config.model.task else _guess(config, base_dir)
    if guess is None:
        return config, None
    return config.model_copy(update={"model": config.model.model_copy(update={"task": guess.task})}), guess


def _on_images(name: str, data: DataConfig, base_dir: Path | None) -> Guess | None:
    """The task that the one of this name is on images, where the rows have images and no texts."""
    task = TASKS[name]
    if not task.of_images or url_of(data.source) is not None or not ((base_dir or Path()) / data.source).is_file():
        return None
    table = first_rows(data, base_dir)
    if not has_images(table, data) or (data.image_column is None and task.claim(table, data) is not None):
        return None
    return Guess(task.of_images, f"model.task: {task.name} and the images of {Path(table.place).name}")


def model_description(model: ModelConfig, base_dir: Path | None) -> dict[str, Any]:
    """The checkpoint's ``config.json``; empty where there is none to be read without loading the model."""
    request = LoadRequest(model.reference, weights=model.weights, base_dir=base_dir)  # no code is run
    return dict(request.source.description(request))


def architectures_of(description: Mapping[str, Any]) -> list[str]:
    """The classes in a ``config.json``; of a language model with other towers as one of texts is called, since its own
    class has the ending of encoder-decoders.
    """
    names = [str(name) for name in description.get("architectures") or ()]
    if not TOWER_CONFIGS & description.keys():
        return names
    return [name.replace("ForConditionalGeneration", "ForCausalLM") for name in names]


def _guess(config: RunConfig, base_dir: Path | None) -> Guess:
    model, source = config.model, config.data.source
    if model.loss is not None:
        return Guess("custom", "model.loss")
    if model.source.default_task:
        return Guess(model.source.default_task, f"{model.reference}, which {model.source.purpose}")
    suffix = Path(source).suffix.lower()
    for task in TASKS.values():
        if suffix and suffix in task.file_suffixes:
            return Guess(task.name, f"data in a {suffix} file")
    architectures = architectures_of(model_description(config.model, base_dir))
    if source.startswith(BUILT_IN_PREFIX) and source in BUILT_IN:
        for task in TASKS.values():
            if task.classes and task.of_classes is not None and task.inputs == BUILT_IN[source].column:
                return Guess(task.name, f"the classes of {source}")
    if url_of(source) is None and (folder := media_folder_of(source, base_dir)) is not None:
        reading = [task for task in TASKS.values() if task.read_folder is not None]
        claiming = [task for task in reading if task.claims_folder is not None and task.claims_folder(folder)]
        for task in (*claiming, *reading):
            if task in claiming or task.claims_folder is None:
                return Guess(task.name, f"the folder {folder.name}")
    return guess_task(architectures, first_rows(config.data, base_dir), config.data)


def possible(task: Any, architectures: Sequence[str]) -> bool:
    """Whether such a checkpoint can be loaded for the task: it has the head, or that is fitted, on the same inputs."""
    of_model = [TASKS[name] for name in map(task_of_class, architectures) if name]
    known = {other.auto_class for other in of_model if other.auto_class}
    if task.auto_class in known or (task.auto_class in TOWERS and TEXT in known):
        return True
    kinds = {_kind(other) for other in of_model}
    if task.auto_class == BASE:  # every checkpoint has a model without a head
        return not task.class_endings or not architectures or task in of_model
    return not architectures or (task.new_head and kinds in (set(), {_kind(task)}))


def _kind(task: Any) -> str:
    """What a task's model reads."""
    return task.inputs if task.inputs in ("image", "audio") else "text"


def _listed(names: Sequence[str]) -> str:
    return " or ".join(names)
