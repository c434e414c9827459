"""From a YAML file to a RunConfig. Every problem of the file is reported at once, each with its line and column."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from layerlens.config.base import must_be, nearest_choice, nearest_key
from layerlens.config.schema import alternatives, annotation_at, as_model, sections_with
from layerlens.config.sections import RunConfig
from layerlens.config.yaml_source import (
    MAX_BYTES,
    Document,
    Location,
    Place,
    Problem,
    dotted,
    read_yaml,
    text_in_yaml_1_1,
)
from layerlens.exceptions import ConfigurationError

UNION = "union"
"""The type of an error that stands for those of all types that a value may be of."""

_AFTER_FILE = 1 << 30  # overrides come after every line of the file


@dataclass(frozen=True)
class Setting:
    """A value that replaces a setting of the file, or is used without a file.

    Args:
        key: dotted key, such as ``optimization.max_trainable_params``.
        value: one text, or a list of texts.
        said: what the user typed, for messages: ``--max-params 300k``.
    """

    key: str
    value: str | list[str]
    said: str


def load_run_config(path: Path, overrides: Sequence[str | Setting] = ()) -> RunConfig:
    """Read, check and return the configuration in ``path``.

    Args:
        path: a YAML file in UTF-8.
        overrides: settings that replace those of the file, as ``section.key=value`` (the value is YAML) or as
            ``Setting``.

    Raises:
        ConfigurationError: the file cannot be read, or it has problems. The message has one line for each problem, such
            as ``config.yaml:5:13: optimization.max_vram: unknown key, did you mean 'max_vram_gb'?``
    """
    return parse_run_config(read_text(Path(path)), str(path), overrides)


def parse_run_config(text: str, source: str = "config.yaml", overrides: Sequence[str | Setting] = ()) -> RunConfig:
    """The same for YAML that is already at hand; ``source`` is its name in messages."""
    document = read_yaml(text, source)
    if document.data is None and not document.problems and not overrides:
        raise ConfigurationError(f"{source}: is empty; write a commented configuration with: layerlens init")
    if not isinstance(document.data, dict) and document.data is not None:
        raise ConfigurationError(
            f"{document.place(())}: must be sections (model:, data:, optimization:), got {_kind(document, ())}"
        )
    document.data = document.data or {}
    for setting in overrides:
        _override(document, setting)
    _empty_sections(document.data)
    problems = document.problems + list(_settle_scalars(document))
    reported = {problem.key for problem in problems}
    try:
        config = RunConfig.model_validate(document.data)
    except ValidationError as error:
        details = error.errors(include_url=False)
        details = _joined_branches(details, document)
        inside = {detail["loc"][:-1] for detail in details}  # a list whose values are all wrong counts as empty
        for detail in details:
            problem = _explain(detail, document)
            if problem.key not in reported and not (detail["type"] == "too_short" and detail["loc"] in inside):
                problems.append(problem)
    if problems:
        raise ConfigurationError("\n".join(str(problem) for problem in sorted(problems)))
    return config


def read_text(path: Path) -> str:
    """The text of a configuration file.

    Raises:
        ConfigurationError: there is none, or it is too large or not UTF-8.
    """
    try:
        if path.is_dir():
            raise ConfigurationError(f"{path} is a directory; give the YAML file in it")
        if path.stat().st_size > MAX_BYTES:
            raise ConfigurationError(f"{path}: larger than {MAX_BYTES // 1024} KiB; this is not a configuration file")
        data = path.read_bytes()
    except FileNotFoundError as error:
        command = shlex.join(["layerlens", "init", str(path)])
        raise ConfigurationError(f"no configuration file at {path}; write one with: {command}") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise ConfigurationError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigurationError(
            f"{path}:{line}: not UTF-8 text (byte {error.start}); save the file as UTF-8"
        ) from error


def _override(document: Document, setting: str | Setting) -> None:
    """Set what the setting says."""
    if isinstance(setting, Setting):
        parts, label, value = setting.key.split("."), setting.said, _as_document(setting)
    else:
        name, equals, text = setting.partition("=")
        parts, label = name.strip().split("."), f"--set {setting}"
        if not equals or not all(parts):
            raise ConfigurationError(f"{label}: must look like optimization.max_trainable_params=20000")
        value = read_yaml(text, label)
    place = Place(_AFTER_FILE, 1, label)
    level = document.data
    for depth, part in enumerate(parts[:-1], start=1):
        if level.get(part) is None:
            level[part] = {}
            document.places[tuple(parts[:depth])] = place
        level = level[part]
        if not isinstance(level, dict):
            raise ConfigurationError(f"{label}: {'.'.join(parts[:depth])} has no keys of its own")
    level[parts[-1]] = value.data
    location = tuple(parts)
    for known in [known for known in document.places if known[: len(location)] == location]:
        del document.places[known]
        document.texts.pop(known, None)
    document.places.update({(*location, *inner): place for inner in value.places})
    document.texts.update({(*location, *inner): text for inner, text in value.texts.items()})
    document.problems = [problem for problem in document.problems if problem.key != dotted(location)]
    document.problems += [Problem(place, dotted(location), problem.message) for problem in value.problems]


def _as_document(setting: Setting) -> Document:
    """The texts of a setting, which are not YAML."""
    value = setting.value
    texts: dict[Location, str] = {(): value} if isinstance(value, str) else {(n,): text for n, text in enumerate(value)}
    place = Place(_AFTER_FILE, 1, setting.said)
    return Document(value, dict.fromkeys(((), *texts), place), texts)


def _empty_sections(data: dict[str, Any], location: Location = ()) -> None:
    """Take a section whose keys are all commented out (YAML reads null) for one that sets nothing."""
    for key in data:
        if as_model(annotation_at((*location, key))) is not None:
            if data[key] is None:
                data[key] = {}
            if isinstance(data[key], dict):
                _empty_sections(data[key], (*location, key))


def _settle_scalars(document: Document) -> Iterator[Problem]:
    """Compare every unquoted scalar with the type that is wanted in its place, where pydantic cannot tell.

    true and false where a number or text is wanted are problems; pydantic takes them for 1 and 0. Text such as 1e5,
    which is a number by YAML 1.2 but text by YAML 1.1 (so writers of that version leave it unquoted), is text there.
    """
    wanted_as = {int: "a whole number", float: "a number", str: "text"}
    for location, text in document.texts.items():
        holder = document.data
        for part in location[:-1]:
            holder = holder[part]
        value = holder[location[-1]]
        kinds = alternatives(annotation_at(location))
        wanted = next((wanted_as[kind] for kind in kinds if kind in wanted_as), None)
        if isinstance(value, bool) and wanted is not None:
            hint = "; put it in quotes if text is meant" if wanted == "text" else ""
            message = f"must be {wanted}, got {text} (a yes/no value){hint}"
            yield Problem(document.place(location), dotted(location), message)
        elif isinstance(value, (int, float)) and wanted == "text" and text_in_yaml_1_1(text):
            holder[location[-1]] = text


def _joined_branches(details: Sequence[ErrorDetails], document: Document) -> list[ErrorDetails]:
    """pydantic's errors with one for each value that may be of several types, where it has one for each of the types.

    Of a mapping or a list those errors stay that are of its own type.
    """
    found: list[ErrorDetails] = []
    by_place: dict[Location, list[ErrorDetails]] = {}
    for detail in details:
        location = detail["loc"]
        of_union = [n for n in range(1, len(location)) if _is_union(annotation_at(location[:n]))]
        if of_union:
            by_place.setdefault(location[: of_union[0]], []).append(detail)
        else:
            found.append(detail)
    for location, branches in by_place.items():
        value = document.value(location)
        tag = "list[" if isinstance(value, list) else "dict[" if isinstance(value, dict) else ""
        own = [one for one in branches if tag and str(one["loc"][len(location)]).startswith(tag)]
        n = len(location)
        if own:
            found += [{**one, "loc": (*location, *one["loc"][n + 1 :])} for one in own]
            continue
        wanted = " or ".join(dict.fromkeys(must_be(one).removeprefix("must be ") for one in branches))
        found.append({**branches[0], "loc": location, "msg": f"Input should be {wanted}", "type": UNION})
    return found


def _is_union(annotation: Any) -> bool:
    return sum(kind is not type(None) for kind in alternatives(annotation)) > 1


def _explain(detail: ErrorDetails, document: Document) -> Problem:
    """One of pydantic's errors in the words of someone who writes YAML."""
    location = tuple(part for part in detail["loc"] if part != "[key]")  # pydantic's mark for a key that is wrong
    kind, place = detail["type"], document.place(location)
    if kind == "extra_forbidden":
        return Problem(place, dotted(location), _unknown_key(location))
    if kind == "missing":
        return Problem(place, dotted(location), "required key is missing")
    if kind == "value_error":
        return Problem(place, dotted(location), detail["msg"].removeprefix("Value error, "))
    came = _kind(document, location, detail["input"]) if location == detail["loc"] else repr(detail["input"])
    message = f"{must_be(detail)}, got {came}"
    if (kind == "string_type" or (kind == UNION and " text" in message)) and location in document.texts:
        message += "; put it in quotes if text is meant"
    return Problem(place, dotted(location), message + nearest_choice(detail))


def _unknown_key(location: Location) -> str:
    key = str(location[-1])
    section = as_model(annotation_at(location[:-1]))
    known = list(section.model_fields) if section is not None else []
    elsewhere = sections_with(key)
    if elsewhere:
        return f"unknown key here, did you mean {elsewhere[0]!r}?"
    nearest = nearest_key(key, known)
    if nearest:
        return f"unknown key, did you mean {nearest!r}?"
    return f"unknown key; known here: {', '.join(known)}"


def _kind(document: Document, location: Location, value: Any = None) -> str:
    """What came, as it was written, or in a word where it is long."""
    if location in document.texts:
        return document.texts[location] or "nothing"
    value = document.data if location == () else value
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, list) else repr(value)
