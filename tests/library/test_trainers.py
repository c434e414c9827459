"""What a trainer gives is what its training sees: batches and loss against a real step; and it stays as it was."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from datasets import Dataset
from picture import differences, picture, random_state
from trainer_support import (
    causal_model,
    chats,
    classifier,
    completions,
    dpo,
    language_model,
    reward,
    sentence_trainer,
    sentences,
    sft,
    tokenizer,
)  # fmt: skip
from transformers import Trainer, TrainingArguments

from layerlens.exceptions import ConfigurationError, DataError, ProfilingError
from layerlens.library.single_losses import single_losses
from layerlens.library.trainers import is_trainer, opened

TRAINERS = {
    "classifier": classifier,
    "classifier, accumulated": lambda folder, **more: classifier(folder, gradient_accumulation_steps=2, **more),
    "causal": language_model,
    "causal, accumulated": lambda folder, **more: language_model(folder, gradient_accumulation_steps=3, **more),
    "label smoothing": lambda folder, **more: language_model(folder, label_smoothing_factor=0.2, **more),
    "sft": sft,
    "sft, bfloat16": lambda folder, **more: sft(folder, **{"bf16": True, **more}),
    "sft, packed": lambda folder, **more: sft(folder, packing=True, **more),
    "sft, padding-free": lambda folder, **more: sft(folder, padding_free=True, **{**more, "max_length": None}),
    "sft, assistant only": lambda folder, **more: sft(folder, data=chats(), assistant_only_loss=True, **more),
    "sft, completion only": lambda folder, **more: sft(folder, data=completions(), **more),
    "dpo": dpo,
    "dpo, no reference given": lambda folder, **more: dpo(folder, "saved", **more),
    "dpo, computed before": lambda folder, **more: dpo(folder, precompute_ref_log_probs=True, **more),
    "reward": reward,
    "reward, accumulated": lambda folder, **more: reward(folder, gradient_accumulation_steps=2, **more),
    "sentences": sentence_trainer,
}


@pytest.fixture(params=TRAINERS)
def make(request, tmp_path):
    return lambda **more: TRAINERS[request.param](tmp_path, **more)


def test_loss_and_gradient_are_those_of_the_first_step(make):
    trainer = make(max_steps=1, max_grad_norm=1e9, learning_rate=0.0)
    trainer.args.logging_nan_inf_filter = False
    with opened(trainer, 6) as given:
        batches = given.batches[: trainer.args.gradient_accumulation_steps]
        losses = [given.loss(given.model, batch) for batch in batches]
        gradients = torch.autograd.grad(sum(losses) / len(losses), list(given.model.parameters()), allow_unused=True)
        norm = torch.stack([part.norm() for part in gradients if part is not None]).norm()
    trainer.train()
    step = trainer.state.log_history[0]
    loose = 2e-2 if trainer.args.bf16 else 2e-4  # what is logged has 4 or 5 digits; bfloat16 has 3
    assert float(sum(losses) / len(losses)) == pytest.approx(step["loss"], rel=loose, abs=2e-4)
    assert float(norm) == pytest.approx(step["grad_norm"], rel=loose, abs=2e-4)


class Interrupted(BaseException):
    """Like Ctrl-C, without ending the test run where it is not caught."""


@pytest.mark.parametrize("end", [None, RuntimeError, Interrupted])
def test_the_trainer_is_as_it_was(make, end):
    trainer = make()
    model_before = picture(trainer.model)
    before, random_before = picture(vars(trainer)), random_state()
    try:
        with opened(trainer, 3, seed=11) as given:
            for batch in given.batches:
                given.loss(given.model, batch)
            if end is not None:
                raise end("now")
    except (RuntimeError, Interrupted):
        pass
    assert random_state() == random_before
    assert differences(before, picture(vars(trainer))) == []
    assert differences(model_before, picture(trainer.model)) == []


class Meter:
    """What people write: a running mean."""

    def __init__(self) -> None:
        self.total, self.values = 0.0, []

    def update(self, value: float) -> None:
        self.total += value
        self.values.append(value)


class OwnTrainer(Trainer):
    """One that notes things in every way that comes to mind."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        loss = torch.nn.functional.cross_entropy(self.scale(logits), labels) * self.temperature
        self.log({"own": float(loss)})
        self.meter.update(float(loss))
        self.notes.setdefault("losses", []).append(float(loss))
        self.count += 1
        self.sums += loss.detach()
        self.state.global_step += 1
        self.control.should_save = True
        self.counts["steps"] += 1
        self.scale.seen += 1
        return loss


def test_what_an_own_trainer_notes_is_not_noted(tmp_path):
    made = classifier(tmp_path)
    trainer = OwnTrainer(
        made.model, made.args, train_dataset=made.train_dataset, processing_class=made.processing_class
    )
    trainer.meter, trainer.notes, trainer.count, trainer.counts = Meter(), {}, 0, {"steps": torch.zeros(())}
    trainer.sums, trainer.temperature = torch.zeros(()), 2.0
    trainer.scale = torch.nn.Linear(2, 2)
    trainer.scale.register_buffer("seen", torch.zeros(()))
    before = picture(vars(trainer))
    with opened(trainer, 3) as given:
        losses = [given.loss(given.model, batch) for batch in given.batches]
        sum(losses).backward()
        for weight in given.model.parameters():
            weight.grad = None
        assert trainer.scale.weight.grad is None
    assert len(losses) == 3
    assert differences(before, picture(vars(trainer))) == []


def test_training_goes_on_as_without_planning(tmp_path):
    """The order of samples, dropout and everything else that is drawn."""
    plain, planned = (classifier(tmp_path / name, max_steps=4) for name in ("plain", "planned"))
    for trainer in (plain, planned):
        trainer.args.seed = 3
        torch.manual_seed(3)
        if trainer is planned:
            with opened(trainer, 3) as given:
                given.loss(given.model, given.batches[0])
        trainer.train()
    for one, other in zip(plain.model.parameters(), planned.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_a_trainer_is(tmp_path):
    assert is_trainer(classifier(tmp_path))
    assert not is_trainer(torch.nn.Linear(2, 2))
    assert not is_trainer(Trainer)


def test_model_and_tokenizer_are_those_of_the_trainer(make):
    trainer = make()
    with opened(trainer, 2) as given:
        assert given.model is getattr(trainer.model, "transformers_model", trainer.model)
        assert given.processing_class is trainer.processing_class


@pytest.mark.parametrize("name", [name for name in TRAINERS if name not in ("sft, packed", "sentences")])
def test_losses_of_single_samples_have_the_mean_of_their_batch(name, tmp_path):
    trainer = TRAINERS[name](tmp_path, per_device_train_batch_size=4, bf16=False)
    trainer.model.eval()
    with opened(trainer, 1) as given:
        singles = single_losses(given, 4)
        mean = sum(singles.loss(given.model, batch) for batch in singles.batches) / 4
        whole = given.loss(given.model, given.collate(list(given.batches[0].rows)))
        assert float(mean) == pytest.approx(float(whole), rel=2e-2 if trainer.args.bf16 else 1e-5)
        assert len(single_losses(given, 3).batches) == 3
        assert singles.by_labels == (singles.batches[0].n_items is not None)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda folder: sft(folder, packing=True), "SFTTrainer .*packing"),
        (sentence_trainer, "MultipleNegativesRankingLoss .*compared with each other"),
        (lambda folder: dpo(folder, loss_type=["sft"]), "DPOTrainer .*all their tokens have one mean"),
    ],
)
def test_a_loss_without_single_samples_is_refused_by_name(make, why, tmp_path):
    trainer = make(tmp_path)
    before = picture(vars(trainer))
    with opened(trainer, 2) as given, pytest.raises(ProfilingError, match=why):
        single_losses(given, 4)
    assert differences(before, picture(vars(trainer))) == []


def grpo(folder):
    from trl import GRPOConfig, GRPOTrainer

    arguments = GRPOConfig(
        str(folder), use_cpu=True, report_to=[], bf16=False, per_device_train_batch_size=2, num_generations=2
    )
    return GRPOTrainer(
        causal_model(), reward_funcs=lambda completions, **more: [0.0] * len(completions), args=arguments,
        train_dataset=Dataset.from_dict({"prompt": sentences()}), processing_class=tokenizer(),
    )  # fmt: skip


def wrapped(folder):
    from peft import LoraConfig

    return sft(folder, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))


class Once(torch.utils.data.IterableDataset):
    """Rows that are gone when they have been read."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def __iter__(self):
        yield from self.rows


def of_iterable(folder, data):
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to=[], max_steps=2)
    return Trainer(causal_model(), arguments, train_dataset=data)


def without_data(folder):
    return Trainer(causal_model(), TrainingArguments(str(folder), use_cpu=True, report_to=[]))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (grpo, ConfigurationError, "GRPOTrainer.*generates during training.*SFTTrainer"),
        (wrapped, ConfigurationError, "SFTTrainer has a PEFT adapter.*LoraConfig.*layerlens.adapt"),
        (without_data, DataError, "no train_dataset"),
        (lambda folder: of_iterable(folder, Once([{"input_ids": [1]}])), DataError, "Once.*read only once"),
        (lambda folder: classifier(folder, per_device_train_batch_size=16, dataloader_drop_last=True), DataError,
         "12 rows, 16 for a batch, and dataloader_drop_last"),
    ],
)  # fmt: skip
def test_a_trainer_that_cannot_be_planned_for_is_told_what_would_work(make, error, says, tmp_path):
    trainer = make(tmp_path)
    before = picture(vars(trainer))
    with pytest.raises(error, match=says), opened(trainer, 2):
        raise AssertionError("never opened")
    assert differences(before, picture(vars(trainer))) == []


def test_a_data_set_that_is_read_from_a_stream(tmp_path):
    rows = classifier(tmp_path).train_dataset.remove_columns("text").to_iterable_dataset()
    made = classifier(tmp_path)
    trainer = Trainer(made.model, made.args, train_dataset=rows, processing_class=made.processing_class)
    before = picture(vars(trainer))
    with opened(trainer, 3) as given:
        assert len(given.batches) == 3
        assert len(single_losses(given, 6).batches) == 6
    assert differences(before, picture(vars(trainer))) == []
    assert next(iter(trainer.get_train_dataloader()))["labels"].tolist() == given.batches[0].inputs["labels"].tolist()
