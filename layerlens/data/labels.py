"""The classes of a user's data as the outputs of a model: matched by name, common spellings, number, or by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from layerlens.data.dataset import Dataset
from layerlens.exceptions import DataError

UNNAMED = re.compile(r"LABEL_(\d+)")
"""What transformers calls the classes of a head that nobody has named."""
HEAD_ADVICE = (
    "map the data's classes to the model's in data.label_names, or set model.new_head: true for a head with the data's "
    "classes"
)
WORD, NUMBER = re.compile(r"[^\W_]+"), re.compile(r"\d+")
SPELLINGS = {
    "neg": "negative", "pos": "positive", "neu": "neutral", "neut": "neutral",
    "per": "person", "org": "organization", "organisation": "organization", "loc": "location",
    "misc": "miscellaneous", "entail": "entailment", "entails": "entailment", "entailed": "entailment",
    "contradict": "contradiction", "contradicts": "contradiction", "non": "not", "no": "not", "stars": "star",
}  # fmt: skip
"""Words of class names that are written in several ways."""
MOST_SHOWN = 8


def outputs_of(classes: Sequence[str], names: Sequence[str]) -> list[int] | None:
    """For each class of the data the number of the model's output of that name; None where they cannot be matched.

    In this order: the same names; names without regard to case, punctuation and common spellings; numbers that stand
    in the model's names (``1 star``); numbers as those of the outputs; and, where the model's names say nothing
    (``LABEL_0``) and there are as many of them, the order of the data's.
    """
    for key in (str, str.casefold, _spelled):
        known = {key(name): position for position, name in enumerate(names)}
        wanted = [key(name) for name in classes]
        if len(known) == len(names) and len(set(wanted)) == len(wanted) and all(name in known for name in wanted):
            return [known[name] for name in wanted]
    unnamed = all(map(UNNAMED.fullmatch, names))
    numbers = [_number(name) for name in classes]
    if None not in numbers:
        inside = [NUMBER.findall(name) for name in names]
        if not unnamed and all(len(found) == 1 for found in inside):
            in_names = {int(found[0]): position for position, found in enumerate(inside)}
            matched = [in_names.get(number) for number in numbers if number is not None]
            return [one for one in matched if one is not None] if None not in matched else None
        if all(number is not None and number < len(names) for number in numbers):
            return [number for number in numbers if number is not None]
    return list(range(len(classes))) if unnamed and len(classes) == len(names) else None


def in_order_of(dataset: Dataset, names: Sequence[str], *, advice: str, of: str = "the model") -> Dataset:
    """The samples with each class at the number of its output; outputs that no sample has stay.

    Args:
        dataset: the samples.
        names: of the outputs, in their order.
        advice: what would work, for the message.
        of: whose outputs they are.

    Raises:
        DataError: they cannot be matched; both lists are shown.
    """
    classes, names = list(dataset.label_names), [str(name) for name in names]
    if not names or not classes or names == classes:
        return dataset
    positions = outputs_of(classes, names)
    if positions is None:
        raise unmatched(classes, names, of=of, advice=advice)
    taken = [
        f"{name} as {names[place]}" for name, place in zip(classes, positions, strict=True) if name != names[place]
    ]
    notes = [f"classes of the data matched with those of {of}: {_shown(taken)}"] if taken else []
    absent = [name for place, name in enumerate(names) if place not in positions]
    if absent:
        notes.append(f"classes of {of} that no sample has: {_shown(absent)}")
    known = replace(dataset, label_names=tuple(names[place] for place in positions))
    return with_notes(known.with_label_order(names), notes)


def unmatched(classes: Sequence[str], names: Sequence[str], *, of: str, advice: str) -> DataError:
    """The error that shows both lists."""
    return DataError(
        f"data.label_names: the data's {len(classes)} classes ({_shown(classes)}) cannot be matched with the "
        f"{len(names)} of {of} ({_shown(names)}); {advice}"
    )


def by_hand(dataset: Dataset, label_names: Sequence[str] | Mapping[str, str] | None) -> Dataset:
    """The samples with the class names that ``data.label_names`` gives: all of them in order, or one for each label.

    Raises:
        DataError: the data has none of the labels, or has others than the list; both lists are shown.
    """
    if label_names is None or not dataset.label_names:
        return dataset
    if not isinstance(label_names, Mapping):
        if len(set(label_names)) < len(label_names):
            raise DataError(f"data.label_names: duplicate names:  {_shown(list(label_names))}; name every class once")
        return in_order_of(dataset, label_names, advice="list all classes of the data", of="data.label_names")
    if not set(label_names) & set(dataset.label_names):
        raise DataError(
            f"data.label_names: the data has none of the labels {_shown(list(label_names))}; it has "
            f"{_shown(dataset.label_names)}"
        )
    renamed = [label_names.get(name, name) for name in dataset.label_names]
    names = list(dict.fromkeys(renamed))
    moved = [names.index(name) for name in renamed]

    def of_class(label: Any) -> Any:
        return tuple(moved[one] for one in label) if isinstance(label, tuple) else moved[label]

    return replace(dataset, labels=tuple(map(of_class, dataset.labels)), label_names=tuple(names))


def with_notes(dataset: Dataset, notes: Sequence[str]) -> Dataset:
    """The same with more that the user should know of how it was read."""
    if dataset.reading is None or not notes:
        return dataset
    kept = [note for note in notes if note not in dataset.reading.notes]
    return replace(dataset, reading=replace(dataset.reading, notes=(*dataset.reading.notes, *kept)))


def _spelled(name: str) -> str:
    """Words in lower case without what separates them, each in its common spelling."""
    return "".join(SPELLINGS.get(word, word) for word in WORD.findall(name.casefold()))


def _number(name: str) -> int | None:
    unnamed = UNNAMED.fullmatch(name)
    text = unnamed[1] if unnamed else name
    return int(text) if text.isdecimal() else None


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
    return ", ".join(names[:MOST_SHOWN]) + more
