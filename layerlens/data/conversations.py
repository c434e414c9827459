"""Conversations as lists of turns with ``role`` and ``content``, from what chat data has in their place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Names that ShareGPT and others give to roles of chat templates."""
KNOWN = ("system", "developer", "user", "assistant", "tool", "ipython")
Turn = dict[str, Any]


class OddRow(Exception):
    """Why a row is left out, in words; never ends a run."""


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of turns, also as JSON text."""
    turns = turns_of(value)
    return (
        isinstance(turns, (list, tuple))
        and bool(turns)
        and isinstance(turns[0], Mapping)
        and ("role" in turns[0] or "from" in turns[0])
    )


def conversation(value: Any, column: str, *, whole: bool = True) -> list[Turn]:
    """The turns of a row, with the roles that chat templates know.

    Args:
        value: a list of ``{"role", "content"}`` or ShareGPT's ``{"from", "value"}``, also as JSON text.
        column: for messages.
        whole: whether the assistant must say something in it.

    Raises:
        OddRow: it is not one.
    """
    turns = turns_of(value)
    if not isinstance(turns, (list, tuple)) or not turns:
        raise OddRow(f"no turns in column {column!r}")
    found = [_turn(turn, column) for turn in turns]
    if whole and not any(turn["role"] == "assistant" for turn in found):
        roles = ", ".join(dict.fromkeys(turn["role"] for turn in found))
        raise OddRow(f"no assistant turn in column {column!r} (only {roles})")
    return found


def question_turns(question: str, system: str = "") -> list[Turn]:
    """A question as the turns of a chat."""
    turns = [{"role": "system", "content": system}] if system else []
    return [*turns, {"role": "user", "content": question}]


def _turn(turn: Any, column: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise OddRow(f"a turn in column {column!r} is not a mapping")
    given = dict(turn)
    role = given.pop("from", None) if "role" not in given else given.pop("role")
    content = given.pop("value", None) if "content" not in given else given.pop("content")
    name = ROLES.get(str(role).lower(), str(role).lower())
    if role is None or name not in KNOWN:
        raise OddRow(f"a turn in column {column!r} has the role {role!r}, not one of {', '.join((*KNOWN, *ROLES))}")
    if content is None and not given.get("tool_calls"):
        raise OddRow(f"a turn in column {column!r} has no content")
    return {"role": name, "content": content, **{key: part for key, part in given.items() if part is not None}}


def with_system(turns: list[Turn], system: str) -> list[Turn]:
    """The turns after what the system says, unless it says something in them already."""
    if not system.strip() or any(turn["role"] in ("system", "developer") for turn in turns):
        return turns
    return [{"role": "system", "content": system}, *turns]


def is_trained(turn: Turn) -> bool:
    """Whether the assistant is to learn this turn of its own; data says no by ``weight: 0`` (OpenAI), ``train: false``
    (axolotl) or ``loss: false`` (ms-swift).
    """
    return all(turn.get(mark) is None or bool(turn[mark]) for mark in ("weight", "train", "loss"))


def past_turns(value: Any, column: str) -> list[Turn]:
    """The turns of a history of (question, answer) pairs, as LLaMA-Factory and ChatGLM have it, or of a conversation.

    Raises:
        OddRow: it is neither.
    """
    pairs = turns_of(value)
    if is_conversation(pairs):
        return conversation(pairs, column, whole=False)
    found: list[Turn] = []
    for pair in pairs or ():
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise OddRow(f"column {column!r} has no pairs of a question and its answer")
        found += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    return found


def turns_of(value: Any) -> Any:
    """The list that a value is, also as JSON text, or of the single turn that it is; any other value as it is."""
    if isinstance(value, Mapping) and ("role" in value or "from" in value):
        return [value]
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return list(value) if hasattr(value, "tolist") else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
