"""The model, batches and loss of a trainer of transformers, TRL or sentence-transformers.

A trainer has its own collation, masking, packing, templates and loss. LayerLens reads its batches as its training
would, and calls ``compute_loss`` as ``training_step`` does. It does this in a copy of the trainer (``double.py``), so
the trainer does not change.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from layerlens.exceptions import ConfigurationError, DataError, ProfilingError
from layerlens.integrations.torch_modules import in_evaluation_mode
from layerlens.library.double import double_of
from layerlens.library.untouched import random_states_kept

WRAPPERS = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
GENERATING = ("_generate_and_score_completions", "_generate_completions", "generate_rollout_completions")
"""Methods of trainers whose loss is over texts that the model itself writes during training."""


@dataclass(frozen=True, eq=False)
class TrainerBatch(Mapping[str, Any]):
    """One batch as the trainer's training sees it. As a mapping, it has the keys and values of ``inputs``.

    Args:
        inputs: the inputs of ``compute_loss``, on the trainer's device.
        n_items: number of labelled tokens (or samples) in all batches of the optimizer step; None if the loss does not
            take it.
        n_steps: number of batches in the optimizer step.
        rows: the samples of the batch; () if the trainer does not use its ``data_collator``.
    """

    inputs: Mapping[str, Any]
    n_items: Any
    n_steps: int
    rows: tuple[Any, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self.inputs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.inputs.keys())

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class GivenByTrainer:
    """The parts of a trainer that LayerLens measures.

    Args:
        model: the module that the trainer trains, without wrappers. For a SentenceTransformer, the transformers model
            in it, which PEFT adapts.
        batches: some of the training batches.
        loss: (model, batch) -> scalar with its graph. An optimizer step follows the gradient of its mean over the
            batches of the step.
        collate: function from rows to a batch, with the trainer's collator.
        processing_class: the tokenizer or processor; None if there is none.
        loss_name: class of the trainer, and class of its loss if it has one.
        why_not_single: the reason why the loss has no part for each sample; "" if LayerLens does not know it
            beforehand.
        precision: precision of the loss: that of autocast if the trainer uses it, else that of the weights.
        notes: differences from the training, in words.
    """

    model: torch.nn.Module
    batches: list[TrainerBatch]
    loss: Callable[[torch.nn.Module, TrainerBatch], torch.Tensor]
    collate: Callable[[list[Any]], TrainerBatch]
    processing_class: Any
    loss_name: str
    why_not_single: str
    precision: torch.dtype
    notes: tuple[str, ...]


def is_trainer(thing: Any) -> bool:
    """Whether this is a ``transformers.Trainer`` or of a class that derives from it; imports nothing."""
    loaded = sys.modules.get("transformers.trainer")
    return loaded is not None and isinstance(thing, loaded.Trainer)


@contextmanager
def opened(trainer: Any, n_batches: int, seed: int | None = None) -> Iterator[GivenByTrainer]:
    """Some training batches of a trainer and its loss; the trainer is as before afterwards, whatever happens.

    Args:
        trainer: not in the middle of ``train()`` on several processes, and without an adapter.
        n_batches: at most so many; fewer where an epoch is shorter.
        seed: of the order of samples; by default that of the trainer, whose training then begins with these batches.

    Raises:
        ConfigurationError: a trainer that cannot be planned for; says what would work.
        DataError: no data, none left, or data that can be read once only.
    """
    refuse_trainer(trainer)
    args = trainer.args
    seed = seed if seed is not None else next(x for x in (args.data_seed, args.seed, 0) if x is not None)
    model = _trained(trainer)
    with double_of(trainer, model) as double, random_states_kept(), in_evaluation_mode(trainer.model):
        from transformers import set_seed

        set_seed(seed)
        batches = _batches(double, n_batches)
        fp16 = ("measured in the precision of the weights, although training computes in float16",) if args.fp16 else ()
        yield GivenByTrainer(
            model, batches, _loss(double, None if model is _bare(trainer.model) else trainer.model),
            lambda rows: _collated(double, rows), getattr(trainer, "processing_class", None),
            _loss_name(trainer), _why_not_single(trainer),
            torch.bfloat16 if _autocasts(double) else next(model.parameters()).dtype, fp16,
        )  # fmt: skip


def refuse_trainer(trainer: Any) -> None:
    """Raise ConfigurationError or DataError for a trainer that cannot be planned for, with what would work."""
    name = type(trainer).__name__
    if any(hasattr(trainer, method) for method in GENERATING):
        raise ConfigurationError(
            f"trainer: the loss of {name} needs texts that the model generates during training, so there is none "
            "beforehand; plan with an SFTTrainer on the same prompts with good answers, then build this trainer with "
            "peft_config=plan.lora_config()"
        )
    if adapters := _adapters(trainer.model):
        raise ConfigurationError(
            f"trainer: the model of this {name} has a PEFT adapter already ({adapters}); build it without peft_config "
            "and call layerlens.adapt(trainer), or plan on the model before PEFT wraps it"
        )
    if trainer.args.world_size > 1:
        raise ConfigurationError(
            f"trainer: {name} runs on {trainer.args.world_size} processes; plan in a script of one process, plan.save "
            "it, and start the training with peft_config=layerlens.load(...).lora_config()"
        )
    data = trainer.train_dataset
    if data is None:
        raise DataError(
            f"trainer: this {name} has no train_dataset; build it with one, or give the data: plan(model, data)"
        )
    if _read_once(data):
        raise DataError(
            f"trainer: its train_dataset ({type(data).__name__}) can be read only once, so training would miss the "
            "samples used for planning; give it a data set whose iterator starts anew, or plan on a list of batches"
        )


def _adapters(model: torch.nn.Module) -> str:
    """The adapters that PEFT has put into a model, in words; "" for none."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None or not any(isinstance(module, tuners.BaseTunerLayer) for module in model.modules()):
        return ""
    configs = getattr(model, "peft_config", {})
    return ", ".join(f"{key}: {type(config).__name__}" for key, config in configs.items()) or "put in by injection"


def _read_once(data: Any) -> bool:
    """Whether the data set is an iterator, or hands out one that it holds."""
    from collections.abc import Iterator as AnIterator

    held = [data, *getattr(data, "__dict__", {}).values()]
    return not hasattr(data, "__len__") and any(isinstance(value, AnIterator) for value in held)


def _bare(model: Any) -> torch.nn.Module:
    while isinstance(model, WRAPPERS):
        model = model.module
    found: torch.nn.Module = model
    return found


def _trained(trainer: Any) -> torch.nn.Module:
    """The module whose layers can be adapted."""
    model: Any = _bare(trainer.model)
    if not hasattr(model, "transformers_model"):  # of a SentenceTransformer
        found: torch.nn.Module = model
        return found
    if model.transformers_model is None:
        raise ConfigurationError(
            f"trainer: its {type(model).__name__} has no Transformer module, so there is nothing that PEFT could "
            "adapt; build it with sentence_transformers' Transformer as its first module"
        )
    inner: torch.nn.Module = model.transformers_model
    return inner


def _batches(double: Any, n_batches: int) -> list[TrainerBatch]:
    """The first batches of an epoch, in groups of an optimizer step."""
    batches: list[TrainerBatch] = []
    loader = iter(double.get_train_dataloader())
    while len(batches) < n_batches:
        wanted = min(double.args.gradient_accumulation_steps, n_batches - len(batches))
        pieces, n_items = double.get_batch_samples(loader, wanted, double.args.device)
        if not pieces:
            break
        calls = double.data_collator.calls[
            len(batches) :
        ]  # one more where a loader reads ahead, none of its own collation
        rows = calls[: len(pieces)] if len(calls) >= len(pieces) else [()] * len(pieces)
        for piece, own in zip(pieces, rows, strict=True):
            batches.append(TrainerBatch(double._prepare_inputs(piece), n_items, len(pieces), own))
    if not batches:
        data = double.train_dataset
        rows_of = f"{len(data)} rows" if hasattr(data, "__len__") else "its iterator gives none"
        dropped = ", and dataloader_drop_last" if double.args.dataloader_drop_last else ""
        raise DataError(
            f"trainer: its train_dataset ({type(data).__name__}) yields no batch ({rows_of}, "
            f"{double.args.train_batch_size} for a batch{dropped}); give it more rows, or smaller batches"
        )
    return batches


def _collated(double: Any, rows: list[Any]) -> TrainerBatch:
    """These rows as a batch that is an optimizer step of its own."""
    batch = double.data_collator.collator(rows)
    n_items = double._get_num_items_in_batch([batch], double.args.device)
    return TrainerBatch(double._prepare_inputs(batch), n_items, 1, tuple(rows))


def _loss(double: Any, whole: torch.nn.Module | None) -> Callable[[torch.nn.Module, TrainerBatch], torch.Tensor]:
    """``compute_loss`` as ``training_step`` of the same trainer calls it; with ``whole`` where that holds the model."""
    half = _autocasts(double)

    def loss(model: torch.nn.Module, batch: TrainerBatch) -> torch.Tensor:
        double.current_gradient_accumulation_steps = batch.n_steps
        with ExitStack() as stack:
            if half:
                stack.enter_context(double.accelerator.autocast())
            inputs = copy.copy(batch.inputs)  # compute_loss takes labels out of them
            value = double.compute_loss(whole or model, inputs, num_items_in_batch=batch.n_items)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            got = f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise ProfilingError(f"trainer: compute_loss of {type(double).__name__} must return one number, got {got}")
        return value.reshape(()) * (batch.n_steps if _is_scaled(double, batch) else 1)

    return loss


def _autocasts(double: Any) -> bool:
    return bool(double.args.bf16 and double.accelerator.native_amp)


def _is_scaled(double: Any, batch: TrainerBatch) -> bool:
    """Whether the losses of an optimizer step are added up, since each is a share of it, and not averaged."""
    said = getattr(double, "loss_is_scaled_for_ga", None)
    if said is not None:
        return bool(said)
    return bool(double.model_accepts_loss_kwargs and batch.n_items is not None) or double.compute_loss_func is not None


def _loss_name(trainer: Any) -> str:
    name, loss = type(trainer).__name__, getattr(trainer, "loss", None)
    losses = loss.values() if isinstance(loss, dict) else [loss]
    kinds = dict.fromkeys(type(one).__name__ for one in losses if isinstance(one, torch.nn.Module))
    return f"{name} with {', '.join(kinds)}" if kinds else name


def _why_not_single(trainer: Any) -> str:
    """What is known of the trainer's loss without computing it."""
    if getattr(trainer.args, "packing", False):
        return "packing: a row of the trainer holds parts of several samples"
    return ""
