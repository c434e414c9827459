"""What a row of a language model's data means: its shape, recognised by the columns of all rows.

A shape is one line of ``SHAPES``: the parts that it must have, with the names that their columns usually have. A row
that lacks a part, or has something else in it, is left out and counted by its reason.
"""

from __future__ import annotations

import json
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from layerlens.config import DataConfig
from layerlens.data.conversations import (
    OddRow,
    Turn,
    conversation,
    is_conversation,
    past_turns,
    question_turns,
    turns_of,
    with_system,
)
from layerlens.data.dataset import Dataset
from layerlens.data.image_turns import Images
from layerlens.data.json_values import parsed
from layerlens.data.table import Table
from layerlens.exceptions import DataError

Names = tuple[str, ...]
SHOWN_CHARACTERS = 300
ANSWERS = (
    "solution", "answer", "answers", "response", "output", "completion", "canonical_solution", "target", "targets",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What rows with these columns are.

    Args:
        name: for the user.
        parts: what the shape must have -> the names that its column may have, the usual one first.
        more: what it may have beside that.
        verbatim: whether prompt and answer are written one after the other as they are, without a chat template.
    """

    name: str
    parts: Mapping[str, Names]
    more: Mapping[str, Names] = field(default_factory=dict)
    verbatim: bool = False

    @property
    def of_pairs(self) -> bool:
        """Whether a row has an answer that is preferred to another one."""
        return "rejected" in self.parts


SYSTEM = {"system": ("system", "system_prompt")}
PAIRS = {"chosen": ("chosen",), "rejected": ("rejected",)}
HISTORY = {"history": ("history",)}
TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns")
CHAT = Shape("chat", {"messages": TURNS}, {"tools": ("tools",), **SYSTEM})
SHAPES = (
    Shape("preference pairs", {"prompt": ("prompt",), **PAIRS}, SYSTEM, verbatim=True),
    Shape("preference pairs", {"question": ("question", "instruction", "query", "input"), **PAIRS}, SYSTEM),
    Shape("preference pairs", {"prompt": TURNS, **PAIRS}, SYSTEM, verbatim=True),
    Shape("preference pairs", PAIRS, SYSTEM, verbatim=True),
    CHAT,
    Shape("prompt and completion", {"prompt": ("prompt",), "answer": ("completion", *ANSWERS)},
          {**HISTORY, **SYSTEM}, verbatim=True),
    Shape("instruction", {"question": ("instruction",), "answer": ("output", *ANSWERS)},
          {"input": ("input", "context"), **HISTORY, **SYSTEM}),
    Shape("question and answer", {"question": ("question", "query", "problem"), "answer": ANSWERS},
          {"context": ("passage", "context"), **HISTORY, **SYSTEM}),
    Shape("input and output", {"question": ("input", "inputs", "source"), "answer": ("output", "target", "targets")},
          SYSTEM),
)  # fmt: skip
TEXT = Shape("text", {"text": ()})
MARKS = ("label", "kto_tag", "kto_label", "desirable", "is_desirable")
"""Columns that say of an answer whether it is wanted, as KTO's rows do."""


@dataclass(frozen=True)
class Recognised:
    """The shape of a table's rows, and which column has which part."""

    shape: Shape
    columns: Mapping[str, str]


def recognise(table: Table, config: DataConfig) -> Recognised | None:
    """The first shape whose parts are all there; None where the rows are of none, and may be plain texts.

    Columns that the configuration names come first: ``text_column`` alone is a text or a chat, with ``label_column`` a
    prompt and its completion; ``chosen_column`` and ``rejected_column`` are pairs.
    """
    if config.chosen_column is not None or config.rejected_column is not None:
        columns = {
            "chosen": table.find(config.chosen_column, "chosen_column", PAIRS["chosen"]),
            "rejected": table.find(config.rejected_column, "rejected_column", PAIRS["rejected"]),
        }
        prompt = config.text_column or next(iter(_there(table, ("prompt",))), None)
        if prompt is not None:
            columns["prompt"] = table.find(prompt, "text_column", ())
        return Recognised(Shape("preference pairs", PAIRS, verbatim=True), columns)
    if config.text_column is not None:
        return _named(table, config)
    for shape in SHAPES:
        named = (*shape.parts.items(), *shape.more.items())
        found = {part: next(iter(_there(table, names)), "") for part, names in named}
        if not all(found[part] for part in shape.parts):
            continue
        if shape is CHAT and not any(map(is_conversation, table.peek(found["messages"]))):
            continue
        columns = {part: column for part, column in found.items() if column}
        if "history" in columns and not any(turns_of(value) for value in table.peek(columns["history"])):
            del columns["history"]  # empty in every row
        if "system" in columns and not any(map(text_of, table.peek(columns["system"]))):
            del columns["system"]
        if len(set(columns.values())) == len(columns):
            if config.label_column is not None and "answer" in columns:
                columns["answer"] = table.find(config.label_column, "label_column", ())
            return Recognised(shape, columns)
    return None


def _named(table: Table, config: DataConfig) -> Recognised:
    column = table.find(config.text_column, "text_column", ())
    if any(map(is_conversation, table.peek(column))):
        return Recognised(CHAT, {"messages": column})
    if config.label_column is None:
        return Recognised(TEXT, {"text": column})
    columns = {"question": column, "answer": table.find(config.label_column, "label_column", ())}
    if config.pair_column is not None:
        columns["context"] = table.find(config.pair_column, "pair_column", ())
    return Recognised(Shape("question and answer", {}), columns)


def _there(table: Table, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that are columns, in any case."""
    by_name = {column.lower(): column for column in reversed(table.columns)}
    return [by_name[name] for name in names if name in by_name]


def read_language(table: Table, config: DataConfig, *, images: bool = False) -> Dataset:
    """Rows of any known shape, or plain texts, as what a causal language model is trained on.

    The columns of the data set say what it is: ``text``; ``messages`` (with ``tools``); ``prompt`` and ``completion``
    (texts one after the other, or conversations); ``question`` and ``answer`` (texts, which the tokenizer's chat
    template joins where there is one); pairs have ``chosen`` and ``rejected`` in place of the answer.

    With ``images``, rows that have some become ``messages`` and ``images``, for the task "image-text".

    Raises:
        DataError: nothing fits; the message has the columns, a row, and the keys to set.
    """
    found = recognise(table, config)
    if found is None:
        found = Recognised(TEXT, {"text": _text_column(table, config)})
    _refuse_unwanted(table, found, config)
    if config.prompt_template is not None:
        table.used.update(dict.fromkeys(_fields(config.prompt_template)))
    table.parts.update((column, part) for part, column in found.columns.items())
    of_turns = not found.shape.of_pairs and ("text" not in found.columns or config.image_column is not None)
    seen = Images(table, config) if images and of_turns else None
    kept, left_out = [], Counter[str]()
    for place, row in enumerate(_rows_of(table, found.columns)):
        try:
            sample = _sample(row, found, config)
            kept.append(sample if seen is None else seen.into(sample, place))
        except OddRow as odd:
            table.leave_out(place, f"({odd})")
            left_out[str(odd)] += 1
    if not kept:
        reason = left_out.most_common(1)[0][0]
        raise DataError(
            f"data.source: {table.place}: no row can be used as {found.shape.name}: {reason}; {_shown(table)}"
        )
    columns = {name: tuple(one[name] for one in kept) for name in dict.fromkeys(name for one in kept for name in one)}
    task = "dpo" if found.shape.of_pairs else "image-text" if "images" in columns else ""
    return Dataset(columns, (None,) * len(kept), (), table.place, task=task)


def _refuse_unwanted(table: Table, found: Recognised, config: DataConfig) -> None:
    """Answers that are marked as unwanted are not to be learnt; columns that the user names are taken as they are.

    Raises:
        DataError: some are.
    """
    named = config.text_column or config.label_column
    if named is not None or found.shape.of_pairs or not {"answer", "messages"} & set(found.columns):
        return
    for column in _there(table, MARKS):
        said = [str(value).strip().lower() for value in table.peek(column) if value is not None]
        if "false" in said and set(said) <= {"false", "true"}:
            raise DataError(
                f"data.source: {table.place}: column {column!r} marks {said.count('false')} of {len(said)} answers as "
                "unwanted, as rows for KTO are, and all of them would be learnt; keep the wanted rows, or give "
                "TRL's KTOTrainer to layerlens.plan in Python; where the column means something else, name the others "
                "in data.text_column and data.label_column"
            )


def question_text(row: Mapping[str, Any]) -> str:
    """The parts of a question in one text: what is to be read first, then the question, then its input."""
    parts = [row.get(name) for name in ("context", "question", "input")]
    return "\n\n".join(part for part in map(text_of, parts) if part)


def text_of(value: Any) -> str:
    """A value as text: yes and no for booleans, the first of several answers; "" where there is none."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):  # as SQuAD and TriviaQA have answers
        return text_of(value.get("text", value.get("value")))
    if isinstance(value, (list, tuple)):
        return text_of(value[0]) if value else ""
    return "" if value is None else str(value).strip("\r\n") if isinstance(value, str) else str(value)


def _rows_of(table: Table, columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows by parts, with the whole row under ""."""
    values = {part: table.values(column) for part, column in columns.items()}
    return [{"": row, **{part: of[n] for part, of in values.items()}} for n, row in enumerate(table.rows)]


def _sample(row: dict[str, Any], found: Recognised, config: DataConfig) -> dict[str, Any]:
    """One row as the columns of a data set."""
    columns = found.columns
    if "text" in columns:
        return {"text": _needed(row, "text", columns)}
    if "messages" in columns:
        tools = {"tools": _readable(row.get("tools"))} if "tools" in columns else {}
        turns = conversation(row["messages"], columns["messages"])
        return {"messages": with_system(turns, text_of(row.get("system"))), **tools}
    if found.shape.of_pairs:
        return _pair(row, found)
    if config.prompt_template is not None:
        return {"prompt": _filled(config.prompt_template, row[""]), "completion": _needed(row, "answer", columns)}
    if "history" in columns:
        part = "prompt" if "prompt" in columns else "question"
        asked, answered = (_turns_of(row, *one, columns) for one in ((part, "user"), ("answer", "assistant")))
        if part == "question":
            asked = question_turns(question_text(row))
        turns = [*past_turns(row["history"], columns["history"]), *asked, *answered]
        return {"messages": with_system(turns, text_of(row.get("system")))}
    if found.shape.verbatim:
        if is_conversation(row["prompt"]) or is_conversation(row["answer"]):
            asked, answered = _turns_of(row, "prompt", "user", columns), _turns_of(row, "answer", "assistant", columns)
            return {"prompt": with_system(asked, text_of(row.get("system"))), "completion": answered}
        if "system" in columns:  # beside what the system says, the prompt is the user's turn
            asked_text, answer = (_needed(row, part, columns) for part in ("prompt", "answer"))
            return {"question": asked_text, "answer": answer, "system": text_of(row["system"])}
        return {"prompt": _needed(row, "prompt", columns, empty=True), "completion": _needed(row, "answer", columns)}
    _needed(row, "question", columns)
    return {
        "question": question_text(row),
        "answer": _needed(row, "answer", columns),
        "system": text_of(row.get("system")),
    }


def _readable(tools: Any) -> Any:
    if isinstance(tools, str) and tools:
        try:
            parsed(tools)
        except json.JSONDecodeError as error:
            raise OddRow(f"its tools are not JSON: {error.msg}") from error
    return tools


def _pair(row: dict[str, Any], found: Recognised) -> dict[str, Any]:
    columns, prompt = found.columns, row.get("prompt")
    if any(map(is_conversation, (row["chosen"], row["rejected"], prompt))):
        better, worse = (_turns_of(row, part, "assistant", columns) for part in ("chosen", "rejected"))
        if is_conversation(prompt):
            turns = conversation(prompt, columns["prompt"], whole=False)
            if columns["prompt"].lower() in TURNS:  # it may have the answer too, and the answers all of it
                turns = turns[:-1] if turns[-1] == better[-1] else turns
                start = len(turns) if better[: len(turns)] == worse[: len(turns)] == turns else 0
                better, worse = better[start:], worse[start:]
            turns = with_system(turns, text_of(row.get("system")))
            return {"prompt": turns, "chosen": better, "rejected": worse}
        shared = _shared(better, worse)
        text = text_of(prompt if prompt is not None else row.get("question"))
        if not shared and text:  # the answers alone, beside a prompt that is a text
            return {"prompt": question_turns(text, text_of(row.get("system"))), "chosen": better, "rejected": worse}
        asked = with_system(better[:shared], text_of(row.get("system")))
        return {"prompt": asked, "chosen": better[shared:], "rejected": worse[shared:]}
    chosen, rejected = (_needed(row, part, columns) for part in ("chosen", "rejected"))
    if chosen == rejected:
        raise OddRow("chosen and rejected are the same")
    if "question" in columns:
        _needed(row, "question", columns)
        return {
            "question": question_text(row),
            "chosen": chosen,
            "rejected": rejected,
            "system": text_of(row.get("system")),
        }
    if "prompt" in columns and "system" in columns:
        text = _needed(row, "prompt", columns)
        return {"question": text, "chosen": chosen, "rejected": rejected, "system": text_of(row["system"])}
    if "prompt" in columns:
        return {"prompt": _needed(row, "prompt", columns, empty=True), "chosen": chosen, "rejected": rejected}
    shared = _shared(chosen, rejected)
    shared -= shared > 0 and chosen[shared - 1] == " "  # the space belongs to the answers
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _turns_of(row: Mapping[str, Any], part: str, role: str, columns: Mapping[str, str]) -> list[Turn]:
    """The turns in a part; a text is one turn of ``role``."""
    if isinstance(row[part], str) and not is_conversation(row[part]):
        return [{"role": role, "content": _needed(row, part, columns)}]
    return conversation(row[part], columns[part], whole=role == "assistant")


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How much two texts or conversations have in common at their beginning, as ``trl.extract_prompt`` counts it."""
    shortest = min(len(one), len(other))
    return next((n for n in range(shortest) if one[n] != other[n]), shortest - 1)


def _needed(row: Mapping[str, Any], part: str, columns: Mapping[str, str], *, empty: bool = False) -> str:
    value = row.get(part)
    text = value if isinstance(value, str) else text_of(value)
    if value is None or not (empty or text.strip()):
        raise OddRow(f"no text in column {columns[part]!r}")
    return text


def _filled(template: str, row: Mapping[str, Any]) -> str:
    names = _fields(template)
    for name in names:
        if name not in row:
            raise OddRow(f"no column {name!r}, which data.prompt_template names")
    return template.format(**{name: text_of(row[name]) for name in names})


def _fields(template: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template) if name]


def _text_column(table: Table, config: DataConfig) -> str:
    """The column of plain texts.

    Raises:
        DataError: there is none; shows what there is.
    """
    from layerlens.data.table import TEXTS

    named = _there(table, TEXTS)
    texts = [name for name in table.columns if any(isinstance(value, str) for value in table.peek(name))]
    found = next(iter([*named, *(texts if len(texts) == 1 else [])]), None)
    if found is None:
        raise DataError(f"data.source: {table.place}: the rows are of no known shape; {_shown(table)}")
    return found


def _shown(table: Table) -> str:
    """The columns, one row shortened, and what to set."""
    row = json.dumps(table.rows[0], ensure_ascii=False, default=str)
    row = row if len(row) <= SHOWN_CHARACTERS else row[: SHOWN_CHARACTERS - 3] + "..."
    return (
        f"its columns are {', '.join(table.columns)}; the first row is {row}; set data.text_column (a text, a prompt "
        "or a list of messages) and, for the answer to it, data.label_column, or data.chosen_column and "
        "data.rejected_column"
    )
