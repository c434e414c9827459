"""What a run would say of the model and the data, from ``config.json`` and the first rows: no weights, no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerlens.config import RunConfig
from layerlens.config.compatibility import refuse_conflicts
from layerlens.data.load import BUILT_IN_PREFIX, HUB_PREFIX, load_dataset, media_folder_of
from layerlens.data.rows import FIRST
from layerlens.exceptions import ModelSpecError
from layerlens.registry import TASKS
from layerlens.storage import url_of
from layerlens.tasks.guess import Guess, architectures_of, model_description, possible, with_task
from layerlens.tasks.lengths import LENGTHS, lowered, positions, refuse_longer
from layerlens.utils.user_code import REFERENCE


def look(config: RunConfig, base_dir: Path | None = None) -> tuple[RunConfig, Guess | None, str]:
    """The configuration with a task, the guess where it had none, and what is read of the data.

    Data of the hub, at URLs and from functions are not opened, unless the task must be guessed from them.

    Raises:
        LayerLensError: what ``layerlens run`` would raise for the same reason.
    """
    refuse_conflicts(config, "run")
    description = model_description(config.model, base_dir)
    config, guess = with_task(config, base_dir)
    config = config.model_copy(update=lowered(config.model, config.data, config.optimization, base_dir)[0])
    refuse_conflicts(config, "run")
    task = TASKS[config.model.task]
    architectures = architectures_of(description)
    if not possible(task, architectures):
        raise ModelSpecError(
            f"model.task: {config.model.reference!r} is a {' or '.join(architectures)}, which has no head for "
            f"{task.name}; give another checkpoint or another task"
        )
    if task.inputs not in ("image", "audio") and (limit := positions(description)) is not None:
        refuse_longer({key: value(config) for key, value in LENGTHS.items()}, limit)
    return config, guess, _data(config, base_dir, task)


def _data(config: RunConfig, base_dir: Path | None, task: Any) -> str:
    source = config.data.source
    if task.load is not None or url_of(source) is not None or source.startswith((BUILT_IN_PREFIX, HUB_PREFIX)):
        return ""
    if REFERENCE.fullmatch(source) and not ((base_dir or Path()) / source).exists():
        return ""
    if task.read_folder is not None and (folder := media_folder_of(source, base_dir)):
        found = task.read_folder(folder, config.data)
        things = "clips" if task.inputs == "audio" else "images"
        return f"{found.description}: {len(found)} {things} of {len(found.label_names)} classes"
    found = load_dataset(config.data, base_dir, task.name, FIRST)
    columns = found.reading.columns if found.reading is not None else ""
    return f"{found.description} ({columns})" if columns else found.description


def fitted(values: dict[str, Any], base_dir: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings for a model and its data that run: with a task, and no longer than the model's positions.

    Args:
        values: by dotted key, with a model, data and a budget.
        base_dir: folder that relative places in them start from.

    Returns:
        The settings, and by key what to say of those that were added.

    Raises:
        LayerLensError: see ``look``.
    """
    config = RunConfig.model_validate(_nested(values))
    found, comments = dict(values), {}
    limit = positions(model_description(config.model, base_dir))
    for key, value in LENGTHS.items():
        if limit is not None and value(config) > limit:
            found[key], comments[key] = limit, f"the model has {limit} positions"
    _, guess, read = look(RunConfig.model_validate(_nested(found)), base_dir)
    if guess is not None:
        found["model.task"], comments["model.task"] = guess.task, f"guessed from {guess.reason}"
    if read:
        comments["data.source"] = read
    return found, comments


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *outer, last = key.split(".")
        place = nested
        for name in outer:
            place = place.setdefault(name, {})
        place[last] = value
    return nested
