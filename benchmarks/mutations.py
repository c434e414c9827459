"""Damage for files: values, keys and structure of documents, and bytes; equal seeds give equal damage."""

from __future__ import annotations

import copy
import json
import struct
from random import Random
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1e308, -1e308, 5e-324, 1e-12, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63),
    10**30, 10**400, float("nan"), float("inf"), -float("inf"), "", " ", "0", "1e3", "none", "lora", "nan", "a" * 5000,
    "../../etc/passwd", "\x00", "\ud800", "é\u2028\x85", "🙂", [], [[]], [None], {}, {"": 0}, {"a": {"b": {}}},
    [0] * 100,
    "LORA", "adapter", "1.0", "2020-01-01T00:00:00Z", [1, "two", None], {"layer": "x", "method": "lora", "rank": 1},
)  # fmt: skip

ODD_BYTES = (
    b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"[" * 3000, b"{", b'"', b"&a ", b"*a", b"!!python/object:os.system ", b"\t",
    b"\r\n", b": ", b"- ", b"1e999", b"NaN", b"9" * 5000, b"---\n", b"%YAML 9.9\n", b"<<: ",
)  # fmt: skip


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every part of a document, as keys and indices."""
    found = [at]
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        found += _places(part, (*at, key))
    return found


def damaged(document: Any, chance: Random) -> Any:
    """A copy with one to three parts replaced, removed, doubled, renamed or moved."""
    document = copy.deepcopy(document)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = [place for place in _places(document) if place]
        if not places:
            return document
        *way, last = chance.choice(places)
        holder = document
        for key in way:
            holder = holder[key]
        kind = chance.randrange(8)
        if kind <= 2:
            holder[last] = copy.deepcopy(chance.choice(ODD))
        elif kind == 3:
            del holder[last]
        elif kind == 4 and isinstance(holder, list):
            holder.insert(chance.randrange(len(holder) + 1), copy.deepcopy(holder[last]))
        elif kind == 4:
            holder[f"{last}{chance.choice(('_', ' ', 'x'))}"] = holder.pop(last)
        elif kind == 5:
            *other_way, other = chance.choice(places)
            source = document
            try:
                for key in (*other_way, other):
                    source = source[key]
            except (KeyError, IndexError, TypeError):
                continue
            holder[last] = copy.deepcopy(source)
        elif kind == 6 and isinstance(holder[last], int | float) and not isinstance(holder[last], bool):
            value = holder[last]
            whole = isinstance(value, int)
            holder[last] = chance.choice((-value, value * 10**300 if whole else value * 1e300, f"{value!s:.40}"))
        elif kind == 7 and isinstance(holder[last], str):
            text = holder[last]
            at = chance.randrange(len(text) + 1)
            holder[last] = text[:at] + chance.choice(("", ".", "\x00", "é", "\ud83d", " ", "9")) + text[at + 1 :]
        else:
            holder[last] = [copy.deepcopy(holder[last])]
    return document


def damaged_bytes(data: bytes, chance: Random) -> bytes:
    """Bytes cut, flipped, doubled, removed or replaced by what parsers stumble over."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(changed) + 1)
        kind = chance.randrange(6)
        if kind == 0:
            del changed[at:]
        elif kind == 1 and at < len(changed):
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 2:
            del changed[at : at + chance.randrange(1, 40)]
        elif kind == 3:
            changed[at:at] = changed[at : at + chance.randrange(1, 200)]
        elif kind == 4:
            changed[at:at] = chance.choice(ODD_BYTES)
        else:
            changed[at : at + 4] = chance.randbytes(4)
    return bytes(changed)


def as_json(document: Any) -> bytes:
    """The document as JSON, with what JSON does not have (NaN, half characters) as Python writes it."""
    return json.dumps(document).encode("utf-8", "surrogatepass")


def damaged_safetensors(data: bytes, key: str, chance: Random) -> bytes:
    """A safetensors file with its description (JSON under ``key``), its header, or its bytes damaged."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = chance.randrange(10)
    if kind <= 5:
        content = damaged(json.loads(header["__metadata__"][key]), chance)
        header["__metadata__"][key] = as_json(content).decode("utf-8", "surrogatepass")
    elif kind <= 7:
        header = damaged(header, chance)
    elif kind == 8:
        return damaged_bytes(data, chance)
    else:
        at = chance.randrange(max(len(body), 1))
        body = body[:at] + chance.randbytes(8) + body[at + 8 :]
    text = as_json(header)
    if chance.random() < 0.05:
        length_said = chance.choice((0, 1, len(text) - 1, len(text) + 1, 2**31, 2**63, 2**64 - 1))
        return struct.pack("<Q", length_said) + text + body
    return struct.pack("<Q", len(text)) + text + body
