"""Rows of a language model's data by their shapes: what the model reads, where there is loss, and what is left out."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch
from language_support import MARKED, UNMARKED, language_model, read, tokenizer
from transformers import AutoTokenizer

from layerlens.config import DataConfig
from layerlens.exceptions import ConfigurationError, DataError
from layerlens.tasks import IGNORED, TASKS, make_batches
from layerlens.tasks.encoded import Encoded

CONFIG = DataConfig(source="-", max_length=256)


def encoded(
    dataset: Any, template: str | None = None, config: DataConfig = CONFIG, **kind: bool
) -> tuple[Encoded, Any]:
    """Samples, and what wrote them."""
    pretrained = language_model(tokenizer(template, **kind))
    found = TASKS[dataset.task or "causal-lm"].encode(pretrained, dataset, config, 0)
    assert isinstance(found, Encoded)
    return found, pretrained.tokenizer


def read_and_learnt(written_by: Any, sample: dict[str, Any]) -> tuple[str, str]:
    """A sample as the model reads it, and the part of it that has loss."""
    learnt = [token for token, label in zip(sample["input_ids"], sample["labels"], strict=True) if label != IGNORED]
    return written_by.decode(sample["input_ids"]), written_by.decode(learnt)


@pytest.mark.parametrize(
    ("row", "whole", "learnt"),
    [
        ({"text": "a b"}, "<s>a b</s>", "<s>a b</s>"),
        ({"question": "1+1?", "answer": "#### 2"}, "<s>1+1?\n#### 2</s>", "#### 2</s>"),
        ({"problem": "1+1?", "level": 3, "solution": "2"}, "<s>1+1?\n2</s>", "2</s>"),
        ({"question": "even?", "passage": "It is 2.", "answer": True}, "<s>It is 2.\n\neven?\nyes</s>", "yes</s>"),
        (
            {"question": "who?", "context": "Ann did.", "answers": {"text": ["Ann", "Anne"], "answer_start": [0, 0]}},
            "<s>Ann did.\n\nwho?\nAnn</s>",
            "Ann</s>",
        ),
        ({"instruction": "Sort", "input": "b a", "output": "a b"}, "<s>Sort\n\nb a\na b</s>", "a b</s>"),
        ({"instruction": "Sing", "input": "", "output": "la", "text": "all"}, "<s>Sing\nla</s>", "la</s>"),
        (
            {"instruction": "Sing", "context": "in C", "response": "la", "category": "x"},
            "<s>Sing\n\nin C\nla</s>",
            "la</s>",
        ),
        ({"system_prompt": "Be.", "question": "q", "response": "r"}, "<s>Be.\n\nq\nr</s>", "r</s>"),
        ({"prompt": "1+1?", "completion": " 2"}, "<s>1+1? 2</s>", " 2</s>"),
        ({"Prompt": "1+1?", "Response": " 2"}, "<s>1+1? 2</s>", " 2</s>"),
        ({"input": "1+1?", "output": "2"}, "<s>1+1?\n2</s>", "2</s>"),
        ({"question": "only this"}, "<s>only this</s>", "<s>only this</s>"),
        ({"text": "ended</s>"}, "<s>ended</s>", "<s>ended</s>"),
    ],
)
def test_all_parts_of_a_row_reach_the_model(tmp_path, row, whole, learnt):
    found, written_by = encoded(read(tmp_path, [row, row]))
    assert [read_and_learnt(written_by, one) for one in found] == [(whole, learnt)] * 2
    assert not found.notes


TURNS = [{"from": "system", "value": "brief"}, {"from": "human", "value": "in?"}, {"from": "gpt", "value": "yes"}]
TURNS += [{"from": "human", "value": "an end?"}, {"from": "gpt", "value": "no"}]


@pytest.mark.parametrize("template", [MARKED, UNMARKED], ids=["marked", "turn by turn"])
def test_what_the_assistant_says_is_learnt_and_nothing_else(tmp_path, template):
    found, written_by = encoded(read(tmp_path, [{"conversations": TURNS, "source": "web"}] * 2), template)
    text, learnt = read_and_learnt(written_by, found[0])
    assert text == "system: brief\nuser: in?\nassistant: yes</s>\nuser: an end?\nassistant: no</s>\n"
    assert learnt.replace("\n", "") == "yes</s>no</s>"


def test_a_question_is_the_users_turn_where_there_is_a_template(tmp_path):
    row = {"instruction": "Sort", "input": "b a", "output": "a b", "system": "Be."}
    found, written_by = encoded(read(tmp_path, [row]), MARKED)
    text, learnt = read_and_learnt(written_by, found[0])
    assert text == "system: Be.\nuser: Sort\n\nb a\nassistant: a b</s>\n"
    assert learnt == "a b</s>\n"
    own = read(tmp_path, [row], prompt_template="Q: {instruction} [{input}]\nA: ")
    found, written_by = encoded(own, MARKED)
    assert read_and_learnt(written_by, found[0]) == ("<s>Q: Sort [b a]\nA: a b</s>", "a b</s>")


def test_named_columns_come_first(tmp_path):
    row = {"frage": "1+1?", "antwort": "2", "text": "other", "besser": "2", "schlechter": "3"}
    found, written_by = encoded(read(tmp_path, [row], text_column="frage", label_column="antwort"))
    assert read_and_learnt(written_by, found[0]) == ("<s>1+1?\n2</s>", "2</s>")
    pairs = read(tmp_path, [row], text_column="frage", chosen_column="besser", rejected_column="schlechter")
    assert pairs.task == "dpo"
    (pair,), written_by = encoded(pairs)
    assert written_by.decode(pair["rejected_ids"]) == "<s>1+1?3</s>"


def test_a_preferred_answer_beside_a_prompt_that_is_a_text(tmp_path):
    """As UltraFeedback has it: the answers hold the prompt again, as turns."""
    asked = {"role": "user", "content": "in?"}
    answers = {
        "chosen": [asked, {"role": "assistant", "content": "yes"}],
        "rejected": [asked, {"role": "assistant", "content": "an"}],
    }
    (pair,), written_by = encoded(read(tmp_path, [{"prompt": "in?", **answers, "score_chosen": 8.5}]), MARKED)
    assert read_and_learnt(written_by, pair) == ("user: in?\nassistant: yes</s>\n", "yes</s>\n")
    alone = {name: turns[1:] for name, turns in answers.items()}
    (other,), _ = encoded(read(tmp_path, [{"prompt": "in?", **alone}]), MARKED)
    assert other == pair


USER, GPT = {"from": "human", "value": "in?"}, {"from": "gpt", "value": "yes"}
SAID = "system: Be.\nuser: in?\nassistant: yes</s>\n"


@pytest.mark.parametrize(
    ("row", "whole", "learnt"),
    [
        ({"conversations": [USER, GPT], "system": "Be."}, SAID, "yes</s>\n"),
        ({"conversations": [*TURNS[:1], USER, GPT], "system": "no"}, SAID.replace("Be.", "brief"), "yes</s>\n"),
        ({"system": "Be.", "prompt": "in?", "response": "yes"}, SAID, "yes</s>\n"),
        (
            {"instruction": "an end?", "input": "", "output": "no", "history": [["in?", "yes"]], "system": "Be."},
            SAID + "user: an end?\nassistant: no</s>\n",
            "yes</s>no</s>\n",
        ),
        (
            {"prompt": "an end?", "response": "no", "history": [["in?", "yes"]]},
            SAID.removeprefix("system: Be.\n") + "user: an end?\nassistant: no</s>\n",
            "yes</s>no</s>\n",
        ),
        ({"instruction": "in?", "output": "yes", "history": []}, SAID.removeprefix("system: Be.\n"), "yes</s>\n"),
        (
            {"messages": [USER, {**GPT, "weight": 0}, TURNS[3], {**TURNS[4], "weight": 1}]},
            SAID.removeprefix("system: Be.\n") + "user: an end?\nassistant: no</s>\n",
            "no</s>\n",
        ),
    ],
)
@pytest.mark.parametrize("template", [MARKED, UNMARKED], ids=["marked", "found turn by turn"])
def test_what_stands_beside_the_turns_reaches_the_model(tmp_path, template, row, whole, learnt):
    found, written_by = encoded(read(tmp_path, [row] * 2), template)
    assert read_and_learnt(written_by, found[0])[0] == whole
    assert read_and_learnt(written_by, found[0])[1].replace("\n", "") == learnt.replace("\n", "")


def test_turns_before_a_question_are_a_source_too(tmp_path):
    row = {"instruction": "an end?", "output": "no", "history": [["in?", "yes"]], "system": "Be."}
    found = read(tmp_path, [row] * 2, "seq2seq")
    assert (found.columns["text"][0], found.labels[0]) == ("Be.\n\nin?\n\nyes\n\nan end?", "no")


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [USER], "chosen": GPT, "rejected": {"from": "gpt", "value": "an"}},
        {"messages": [USER], "chosen": "yes", "rejected": "an"},
        {"messages": [USER, GPT], "chosen": [USER, GPT], "rejected": [USER, {"from": "gpt", "value": "an"}]},
        {"prompt": "in?", "chosen": GPT, "rejected": {"from": "gpt", "value": "an"}},
        {"prompt": "in?", "chosen": "yes", "rejected": "an"},
    ],
)
def test_preferences_with_their_system_and_turns(tmp_path, row):
    (pair,), written_by = encoded(read(tmp_path, [row | {"system": "Be."}]), MARKED)
    assert read_and_learnt(written_by, pair) == (SAID, "yes</s>\n")
    assert written_by.decode(pair["rejected_ids"]) == SAID.replace("yes", "an")


def test_answers_that_are_marked_as_unwanted_are_refused(tmp_path):
    """Rows for KTO: trained as prompts and completions, the bad answers would be learnt."""
    rows: list[dict[str, Any]] = [{"prompt": "in?", "completion": "yes", "label": wanted} for wanted in (True, False)]
    with pytest.raises(DataError, match=r"column 'label' marks 1 of 2 answers as unwanted.*KTOTrainer"):
        read(tmp_path, rows)
    assert len(read(tmp_path, rows[:1])) == 1
    assert len(read(tmp_path, rows, text_column="prompt", label_column="completion")) == 2
    chats = [{"conversations": [USER, GPT], "kto_tag": wanted} for wanted in ("true", "false", "false")]
    with pytest.raises(DataError, match=r"column 'kto_tag' marks 2 of 3 answers"):
        read(tmp_path, chats)


def test_long_texts_become_several_samples_that_hold_every_token(tmp_path):
    rows = [{"text": "in the end " * 40}, {"text": "the end"}]
    found, written_by = encoded(read(tmp_path, rows), config=DataConfig(source="-", max_length=32))
    whole = written_by(rows[0]["text"] + "</s>")["input_ids"]
    *pieces, short = [one["input_ids"] for one in found]
    assert [token for piece in pieces for token in piece] == whole
    assert len(pieces) == -(-len(whole) // 32)
    assert written_by.decode(short) == "<s>the end</s>"
    assert found.notes == [
        f"data: 1 of 2 rows are longer than data.max_length (32 tokens); they are split into {len(found)} samples"
    ]
    assert len(found.spread(3)) == 3
    assert found.spread(3).notes[-1] == f"data: 3 of {len(found)} samples are used, spread evenly"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "no turns in column 'messages'"),
        ({"messages": None}, "no turns in column 'messages'"),
        ({"messages": [{"role": "system", "content": "x"}]}, r"no assistant turn .* \(only system\)"),
        ({"messages": [{"role": "user", "content": "x"}]}, r"no assistant turn .* \(only user\)"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "has the role 'narrator', not one of system"),
        ({"messages": [{"role": "assistant", "content": None}]}, "has no content"),
        ({"messages": ["hello"]}, "a turn in column 'messages' is not a mapping"),
        ({"other": 1}, "no turns in column 'messages'"),
    ],
)
def test_an_odd_chat_is_left_out_with_its_reason(tmp_path, row, reason):
    sound = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    dataset = read(tmp_path, [sound, row, sound])
    assert len(dataset) == 2
    assert re.search(reason, dataset.notes[0])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "", "answer": "a"}, "no text in column 'question'"),
        ({"question": "q", "answer": None}, "no text in column 'answer'"),
        ({"question": "q"}, "no text in column 'answer'"),
    ],
)
def test_rows_without_a_part_are_left_out(tmp_path, row, reason):
    dataset = read(tmp_path, [{"question": "q", "answer": "a"}, {"question": "r", "answer": "b"}, row])
    assert len(dataset) == 2
    assert dataset.notes == [f"data: left out 1 of 3 rows: sample 3 ({reason})"]


def test_answers_that_are_cut_away_are_counted_and_left_out(tmp_path):
    rows = [
        {"prompt": "in " * 40, "completion": "the end"},
        {"prompt": "in", "completion": " the end" * 40},
        {"prompt": "in", "completion": " it"},
    ]
    found, _ = encoded(read(tmp_path, rows), config=DataConfig(source="-", max_length=32))
    assert [len(one["input_ids"]) for one in found] == [32, 6]
    assert found.notes == [
        "data: left out 1 of 3 rows: no token of the answer is left within data.max_length",
        "data: 2 of 3 rows are longer than data.max_length (32 tokens) and are truncated; raise it to keep their ends",
    ]
    with pytest.raises(DataError, match="none of the 1 rows can be used: no token of the answer"):
        make_batches(
            TASKS["causal-lm"], language_model(tokenizer()), read(tmp_path, rows[:1]),
            DataConfig(source="-", max_length=32), batch_size=1,
        )  # fmt: skip
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no"} for row in rows]
    found, _ = encoded(read(tmp_path, pairs), config=DataConfig(source="-", max_length=32))
    assert len(found) == 2
    assert found.left_out.total() == 1


def test_chats_without_a_template_are_refused(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    with pytest.raises(ConfigurationError, match="the tokenizer of tiny-llama has no chat template"):
        encoded(read(tmp_path, rows))


def test_a_template_that_refuses_a_chat_leaves_it_out(tmp_path):
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + MARKED
    rows = [
        {"messages": [{"role": role, "content": "a"}, {"role": "assistant", "content": "b"}]}
        for role in ("user", "system")
    ]
    found, _ = encoded(read(tmp_path, rows), strict)
    assert len(found) == 1
    assert found.notes == ["data: left out 1 of 2 rows: the chat template refuses it: no system turns"]


def test_without_trl_the_assistants_turns_are_found_and_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.chat_template_utils", None)
    monkeypatch.setitem(sys.modules, "trl", None)
    found, written_by = encoded(read(tmp_path, [{"conversations": TURNS}]), UNMARKED)
    assert read_and_learnt(written_by, found[0])[1].replace("\n", "") == "yes</s>no</s>"
    assert "pip install" in found.notes[0]
    with pytest.raises(ConfigurationError, match="packing: bfd is done by TRL, which is not installed"):
        encoded(read(tmp_path, [{"text": "a"}]), config=DataConfig(source="-", packing="bfd"))


def test_neither_a_padding_nor_an_end_token_is_needed(tmp_path):
    dataset = read(tmp_path, [{"text": "in the end " * (1 + n % 3)} for n in range(4)])
    pretrained = language_model(tokenizer(eos=False, pad=False))
    (batch,) = make_batches(TASKS["causal-lm"], pretrained, dataset, CONFIG, batch_size=9)
    assert batch.mask.sum(dim=1).unique().numel() > 1
    assert torch.equal(batch.labels == IGNORED, batch.mask == 0)
    assert torch.isfinite(TASKS["causal-lm"].loss(pretrained.model(**batch.inputs), batch)).all()
    found, _ = encoded(dataset, eos=False)
    assert found.notes == ["data: the tokenizer has no end-of-text token (eos_token), so no sample ends with one"]


def test_rows_of_no_shape_are_shown(tmp_path):
    rows = [{"name": "x" * 400, "title": "y", "n": 3}]
    with pytest.raises(
        DataError, match=r"columns are name, title, n; the first row is .*\.\.\.; set data.text_column"
    ) as error:
        read(tmp_path, rows)
    assert len(str(error.value)) < 800
    with pytest.raises(DataError, match=r"no preference pairs; its columns are text"):
        read(tmp_path, [{"text": "a"}], "dpo")


def test_sources_of_seq2seq_have_all_their_parts(tmp_path):
    rows = [{"instruction": way, "input": "pear apple", "output": "x"} for way in ("Sort", "Reverse")]
    dataset = read(tmp_path, [*rows, {"instruction": "Sing", "input": "", "output": "la"}], "seq2seq")
    assert dataset.texts == ("Sort\n\npear apple", "Reverse\n\npear apple", "Sing")
    assert dataset.labels == ("x", "x", "la")
    asked = read(tmp_path, [{"question": "who?", "context": "Ann did.", "answer": "Ann"}], "seq2seq")
    assert asked.texts == ("Ann did.\n\nwho?",)


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"question": "even?", "passage": "It is 2.", "label": 1}, ("even?", "It is 2.")),
        ({"question": "who?", "sentence": "Ann did.", "label": 1, "idx": 0}, ("who?", "Ann did.")),
        ({"premise": "a", "hypothesis": "b", "label": 1}, ("a", "b")),
        ({"sentence1": "a", "sentence2": "b", "label": 1}, ("a", "b")),
    ],
)
def test_pairs_of_texts_are_known_by_their_columns(tmp_path, row, texts):
    dataset = read(tmp_path, [row, {**row, "label": 0}], "sequence-classification")
    assert (dataset.texts[0], dataset.pairs[0]) == texts
    one = read(tmp_path, [row, {**row, "label": 0}], "sequence-classification", text_column=next(iter(row)))
    assert not one.pairs


def test_long_texts_of_masked_models_are_cut_too(tmp_path, minilm_path):
    written_by = AutoTokenizer.from_pretrained(minilm_path)
    rows = [{"text": "one two three four five six " * 10}, {"text": "seven"}]
    pretrained = language_model(written_by)
    found = TASKS["masked-lm"].encode(
        pretrained, read(tmp_path, rows, "masked-lm"), DataConfig(source="-", max_length=16), 0
    )
    ids = [
        [label if label != IGNORED else token for token, label in zip(one["input_ids"], one["labels"], strict=True)]
        for one in found
    ]
    whole = written_by(rows[0]["text"], add_special_tokens=False)["input_ids"]
    assert [token for piece in ids[:-1] for token in piece[1:-1]] == whole
    assert all(piece[0] == written_by.cls_token_id and len(piece) <= 16 for piece in ids)
    assert "1 of 2 rows are longer" in found.notes[0]
