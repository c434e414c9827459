"""The classes of a user's data in the order of the model's outputs, by their names."""

from __future__ import annotations

import re
from typing import Any

import torch

from layerlens.data import Dataset
from layerlens.exceptions import DataError

UNNAMED = re.compile(r"LABEL_\d+")
"""What transformers calls the classes of a head that nobody has named."""


def in_order_of_outputs(dataset: Dataset, model: torch.nn.Module) -> Dataset:
    """The samples with each class at the number of its output.

    Classes are matched by name, without regard to case; numbers are the outputs themselves; and where the model's head
    has names that say nothing, the order of the data's is taken.

    Raises:
        DataError: they cannot be matched; both lists are shown.
    """
    config: Any = getattr(model, "config", None)
    own = getattr(config, "id2label", None) or {}
    names = [str(own[index]) for index in sorted(own)]
    classes = list(dataset.label_names)
    if not names or not classes or names == classes:
        return dataset
    lowered = {name.casefold(): position for position, name in enumerate(names)}
    if len(lowered) == len(names) and all(name.casefold() in lowered for name in classes):
        return _renamed(dataset, [lowered[name.casefold()] for name in classes], names)
    if all(name.isdecimal() and int(name) < len(names) for name in classes):
        return _renamed(dataset, [int(name) for name in classes], names)
    if all(map(UNNAMED.fullmatch, names)) and len(classes) == len(names):
        return dataset
    raise DataError(
        f"data: its classes ({_shown(classes)}) are not those of the model's {len(names)} outputs ({_shown(names)}); "
        "load the model with num_labels, id2label and label2id of the data, or name the classes as the model does"
    )


def _renamed(dataset: Dataset, position: list[int], names: list[str]) -> Dataset:
    """The classes by the model's names, at their positions among its outputs."""
    known = [names[index] for index in position]
    return Dataset(dataset.columns, dataset.labels, tuple(known), dataset.description).with_label_order(names)


def _shown(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
