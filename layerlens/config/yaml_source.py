"""YAML as plain values, each with the place it was written at, so that every later error can point at it.

YAML is read by the rules of its version 1.2: ``1e-4`` is a number, ``yes`` and ``2024-01-01`` are text. Duplicate keys,
tags, and files made to exhaust memory (aliases of aliases, endless nesting) are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from layerlens.exceptions import ConfigurationError

Location = tuple[str | int, ...]

MAX_BYTES = 256 * 1024
MAX_NODES = 10_000  # after aliases are written out
MAX_DEPTH = 32

_CORE = "tag:yaml.org,2002:"
_PLAIN = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+"),
    "float": re.compile(
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
    ),
}


class _Loader(yaml.SafeLoader):
    """The safe loader, of which only the composer is used, with YAML 1.2's rules for plain scalars."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's name for it; filled below


for _name, _pattern in _PLAIN.items():
    _Loader.add_implicit_resolver(_CORE + _name, re.compile(rf"(?:{_pattern.pattern})\Z"), None)


class Place(NamedTuple):
    """Where a value was written; sorts in the order of the file. ``line`` and ``column`` count from 1."""

    line: int
    column: int
    label: str

    def __str__(self) -> str:
        return self.label


class Problem(NamedTuple):
    """One line for the user: place, key, what is wrong and what would work."""

    place: Place
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.key}: {self.message}" if self.key else f"{self.place}: {self.message}"


@dataclass
class Document:
    """The values of a YAML text.

    Args:
        data: dicts, lists and scalars.
        places: the place of each value. That of a mapping or a list that begins below its key is the key's.
        texts: scalars that were written without quotes, as they were written.
        problems: what is wrong with the text itself (duplicate keys, tags ...).
    """

    data: Any = None
    places: dict[Location, Place] = field(default_factory=dict)
    texts: dict[Location, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def value(self, location: Location) -> Any:
        """What stands at ``location``; None where there is nothing."""
        value = self.data
        for part in location:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def place(self, location: Location) -> Place:
        """Where ``location`` is written, or the nearest value around it."""
        while location not in self.places and location:
            location = location[:-1]
        return self.places[location]


def dotted(location: Location) -> str:
    """A location as the user writes it: ``optimization.lora_ranks[2]``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def text_in_yaml_1_1(scalar: str) -> bool:
    """Whether YAML 1.1, which PyYAML and many tools write, takes the unquoted ``scalar`` for text."""
    return bool(yaml.SafeLoader("").resolve(yaml.ScalarNode, scalar, (True, False)) == _CORE + "str")


def read_yaml(text: str, source: str) -> Document:
    """Read one YAML document.

    Args:
        text: the YAML text.
        source: the file's name for messages.

    Raises:
        ConfigurationError: not YAML, with the place where reading stopped; or larger or deeper than any configuration.
    """
    if len(text) > MAX_BYTES:
        raise ConfigurationError(f"{source}: larger than {MAX_BYTES // 1024} KiB; this is not a configuration file")
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise ConfigurationError(_syntax_error(error, source)) from error
    except yaml.reader.ReaderError as error:
        before = text[: int(error.position)]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise ConfigurationError(
            f"{source}:{line}:{column}: not YAML: character U+{ord(text[int(error.position)]):04X} is not allowed"
        ) from error
    except RecursionError as error:
        raise ConfigurationError(f"{source}: nested deeper than {MAX_DEPTH} levels") from error
    except (ValueError, OverflowError) as error:  # PyYAML lets escapes such as "\UFFFFFFFF" through to chr()
        raise ConfigurationError(f"{source}: not YAML: {error}") from error
    document = Document()
    if node is None:
        document.places[()] = Place(1, 1, f"{source}:1:1")
    else:
        _Converter(document, source).convert(node, (), _Converter.mark(node, source))
    return document


def _syntax_error(error: yaml.MarkedYAMLError, source: str) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
    message = ", ".join(part for part in (error.context, error.problem) if part)
    if "'\\t'" in message:
        message += "; indent with spaces, not tabs"
    elif "expected a single document" in message:
        message = "a second document begins here (---); keep one configuration in one file"
    elif "mapping values are not allowed here" in message:
        message += "; check the indentation, and put text with ': ' in it in quotes"
    elif "found undefined alias" in message or "expected alphabetic or numeric" in message:
        message += "; put text that begins with * or & in quotes"
    return f"{place}: not YAML: {message}"


class _Converter:
    """Walks the composed nodes and fills a Document."""

    def __init__(self, document: Document, source: str) -> None:
        self.document = document
        self.source = source
        self.nodes = 0

    @staticmethod
    def mark(node: yaml.Node, source: str) -> Place:
        line, column = node.start_mark.line + 1, node.start_mark.column + 1
        return Place(line, column, f"{source}:{line}:{column}")

    def convert(self, node: yaml.Node, location: Location, place: Place) -> None:
        self.document.places[location] = place
        self.document.data = self._value(node, location)

    def _value(self, node: yaml.Node, location: Location) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES or len(location) > MAX_DEPTH:
            limit = (
                f"more than {MAX_NODES} values" if self.nodes > MAX_NODES else f"nested deeper than {MAX_DEPTH} levels"
            )
            raise ConfigurationError(f"{self.mark(node, self.source)}: {limit}; check the aliases (*name)")
        if isinstance(node, yaml.MappingNode) and node.tag == _CORE + "map":
            return self._mapping(node, location)
        if isinstance(node, yaml.SequenceNode) and node.tag == _CORE + "seq":
            return self._sequence(node, location)
        if isinstance(node, yaml.ScalarNode) and node.tag.removeprefix(_CORE) in (*_PLAIN, "str"):
            return self._scalar(node, location)
        tag = node.tag.replace(_CORE, "!!")
        return self._problem(location, f"tag {tag!r} is not allowed; write the plain value")

    def _problem(self, location: Location, message: str) -> None:
        self.document.problems.append(Problem(self.document.place(location), dotted(location), message))

    def _mapping(self, node: yaml.MappingNode, location: Location) -> dict[str, Any]:
        result: dict[str, Any] = {}
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            here = self.mark(key_node, self.source)
            if not isinstance(key_node, yaml.ScalarNode):
                self.document.problems.append(Problem(here, dotted(location), "keys must be plain names"))
                continue
            key = key_node.value
            child = (*location, key)
            if key == "<<" and key_node.style is None:
                message = "merge keys are not supported; write the values out"
                self.document.problems.append(Problem(here, dotted(child), message))
                continue
            if key in first:
                message = f"duplicate key, first set in line {first[key]}; remove one of them"
                self.document.problems.append(Problem(here, dotted(child), message))
                continue
            first[key] = here.line
            there = self.mark(value_node, self.source)
            empty = isinstance(value_node, yaml.ScalarNode) and value_node.start_mark.index == value_node.end_mark.index
            # A value below its key, or an alias to elsewhere, would point away from the key that the message names.
            self.document.places[child] = there if there.line == here.line and not empty else here
            result[key] = self._value(value_node, child)
        return result

    def _sequence(self, node: yaml.SequenceNode, location: Location) -> list[Any]:
        result = []
        for index, item in enumerate(node.value):
            child = (*location, index)
            self.document.places[child] = self.mark(item, self.source)
            result.append(self._value(item, child))
        return result

    def _scalar(self, node: yaml.ScalarNode, location: Location) -> Any:
        kind, text = node.tag.removeprefix(_CORE), node.value
        if kind == "str":
            if node.style is None:
                self.document.texts[location] = text
            return text
        if not _PLAIN[kind].fullmatch(text):  # an explicit tag such as `!!int abc`
            return self._problem(location, f"{text!r} is not a value of type {kind}")
        self.document.texts[location] = text
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        digits = text.replace("_", "").lower()
        try:
            if kind == "int":
                base = {"0x": 16, "0o": 8}.get(digits[:2], 10)
                return int(digits, base)
            return float(digits.replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:  # Python limits the digits of an int
            return self._problem(location, "number with too many digits")
