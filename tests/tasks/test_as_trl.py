"""What is profiled is what TRL trains on: token ids, labels and the loss of DPO, by its trainers on the same rows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset as Rows
from language_support import MARKED, UNMARKED, language_model, read, tokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from layerlens.config import DataConfig
from layerlens.tasks import TASKS, make_batches
from layerlens.tasks.dpo import add_reference

LIMIT = 48
ARGUMENTS: dict[str, Any] = {"report_to": [], "use_cpu": True, "bf16": False, "max_length": LIMIT}

TEXTS = [{"text": f"item {i} is {'fine ' * (i % 7)}in the end"} for i in range(12)]
PROMPTS = [
    {"prompt": f"What is {i}+1?{' ' * (i % 2)}", "completion": f"{'the ' * (i % 9)}It is {i + 1}."} for i in range(12)
]
CHATS = [
    {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": f"is {i} in?"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "and then?"},
            {"role": "assistant", "content": "in the end " * (i % 3)},
        ]
    }
    for i in range(12)
]
CHAT_PROMPTS = [
    {"prompt": chat["messages"][:2], "completion": [{"role": "assistant", "content": f"in {i}"}]}
    for i, chat in enumerate(CHATS)
]
PAIRS = [
    {"prompt": f"What is {i}+1?", "chosen": f" It is {i + 1}." + "." * (3 * i), "rejected": f" It is {i}."}
    for i in range(12)
]
CHAT_PAIRS = [
    {
        "prompt": chat["messages"][:2],
        "chosen": [{"role": "assistant", "content": f"in {i}"}],
        "rejected": [{"role": "assistant", "content": "an err"}],
    }
    for i, chat in enumerate(CHATS)
]
IMPLICIT = [{"chosen": f"Human: {i}? Bot: the one", "rejected": f"Human: {i}? Bot: an other"} for i in range(12)]
IMPLICIT_CHATS = [
    {"chosen": [*pair["prompt"], *pair["chosen"]], "rejected": [*pair["prompt"], *pair["rejected"]]}
    for pair in CHAT_PAIRS
]


def trained_on(folder: Path, rows: list[dict[str, Any]], written_by: Any, **options: Any) -> list[tuple[Any, Any]]:
    """Token ids and labels that SFTTrainer trains on."""
    trainer = SFTTrainer(
        language_model(written_by).model,
        args=SFTConfig(output_dir=str(folder / "sft"), **ARGUMENTS, **options),
        train_dataset=Rows.from_list(copy.deepcopy(rows)),
        processing_class=written_by,
    )
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


@pytest.mark.parametrize(
    ("rows", "template", "options"),
    [
        (TEXTS, None, {}),
        (PROMPTS, None, {}),
        (CHATS, MARKED, {"assistant_only_loss": True}),
        (CHAT_PROMPTS, MARKED, {}),
        (CHAT_PROMPTS, UNMARKED, {}),
    ],
    ids=["text", "prompt and completion", "chat", "prompt and completion as chat", "without marks"],
)
def test_tokens_and_labels_are_those_of_the_sft_trainer(tmp_path, rows, template, options):
    written_by = tokenizer(template)
    expected = trained_on(tmp_path, rows, copy.deepcopy(written_by), **options)
    dataset = read(tmp_path, rows)
    found = TASKS["causal-lm"].encode(language_model(written_by), dataset, DataConfig(source="-", max_length=LIMIT), 0)
    assert [(one["input_ids"], one["labels"]) for one in found] == expected
    assert len(expected) > 8
    assert any(ids[-1] == written_by.eos_token_id or template for ids, _ in expected)


@pytest.mark.parametrize(
    ("rows", "template"),
    [(PAIRS, None), (CHAT_PAIRS, MARKED), (IMPLICIT, None), (IMPLICIT_CHATS, UNMARKED)],
    ids=["texts", "chats", "texts without a prompt", "chats without a prompt"],
)
def test_pairs_and_their_loss_are_those_of_the_dpo_trainer(tmp_path, rows, template):
    written_by = tokenizer(template)
    policy, reference = language_model(written_by), language_model(written_by)
    with torch.no_grad():  # else the loss of every pair is log 2
        for parameter in policy.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    trainer = DPOTrainer(
        copy.deepcopy(policy.model),
        ref_model=copy.deepcopy(reference.model),
        args=DPOConfig(output_dir=str(tmp_path / "dpo"), **ARGUMENTS),
        train_dataset=Rows.from_list(copy.deepcopy(rows)),
        processing_class=copy.deepcopy(written_by),
    )
    dataset = read(tmp_path, rows)
    assert dataset.task == "dpo"
    config = DataConfig(source="-", max_length=LIMIT)
    task = TASKS["dpo"]
    (batch,) = make_batches(task, policy, dataset, config, batch_size=99)
    order = batch.index.tolist()
    samples = list(trainer.train_dataset)
    theirs = trainer.data_collator([samples[number] for number in order])
    both = [theirs[name].unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1) for name in theirs]  # ours is pair by pair
    ids, mask, answers = both[: len(theirs)]
    assert torch.equal(batch.inputs["input_ids"], ids)
    assert torch.equal(batch.inputs["attention_mask"], mask)
    assert torch.equal(batch.labels["labels"].flatten(0, 1) != -100, answers.bool())

    features = task.encode(policy, dataset, config, 0)
    add_reference(reference.model, reference, features, 5)
    inputs, targets = task.collate(policy, [features[number] for number in order])
    with torch.no_grad():
        losses = task.loss(policy.model(**inputs), type(batch)(inputs, targets, batch.index, 2))
        expected = trainer.compute_loss(trainer.model, dict(theirs))
    assert float(losses.mean()) == pytest.approx(float(expected), rel=1e-4)
    assert losses.std() > 1e-3


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packed_rows_are_those_of_the_sft_trainer(tmp_path, strategy):
    written_by = tokenizer()
    rows = [*TEXTS, {"text": "in the end " * 20}]
    trainer = SFTTrainer(
        language_model(written_by).model,
        args=SFTConfig(
            output_dir=str(tmp_path / "sft"),
            packing=True,
            packing_strategy=strategy,
            shuffle_dataset=False,
            **ARGUMENTS,
        ),
        train_dataset=Rows.from_list(copy.deepcopy(rows)),
        processing_class=copy.deepcopy(written_by),
    )
    pretrained, config = language_model(written_by), DataConfig(source="-", max_length=LIMIT, packing=strategy)
    pretrained.model.config.use_cache = False  # as while it is measured, and in TRL's compute_loss
    task = TASKS["causal-lm"]
    found = task.encode(pretrained, read(tmp_path, rows), config, 0)
    theirs = list(trainer.train_dataset)
    assert [list(map(int, one["input_ids"])) for one in found] == [row["input_ids"] for row in theirs]
    batches = make_batches(task, pretrained, read(tmp_path, rows), config, batch_size=4)
    losses = torch.zeros(len(found))
    with torch.no_grad():
        for batch in batches:
            losses[batch.index] = task.loss(pretrained.model(**batch.inputs), batch)
        for number, row in enumerate(theirs):
            inputs = trainer.data_collator([row])
            labelled = int((inputs["labels"][:, 1:] != -100).sum())
            loss = pretrained.model(
                **{name: inputs[name] for name in ("input_ids", "labels", "position_ids") if name in inputs}
            ).loss
            assert float(losses[number]) == pytest.approx(float(loss) * labelled, rel=1e-4)
    if strategy != "wrapped":  # as each text alone
        short = [row for row in rows if len(row["text"]) < 30]
        alone = make_batches(task, pretrained, read(tmp_path, short), DataConfig(source="-"), batch_size=1)
        with torch.no_grad():
            whole = sum(float(task.loss(pretrained.model(**one.inputs), one)) for one in alone)
            packed = make_batches(task, pretrained, read(tmp_path, short), config, batch_size=4)
            assert sum(float(task.loss(pretrained.model(**one.inputs), one).sum()) for one in packed) == pytest.approx(
                whole, rel=1e-4
            )
