"""A job on a program's own objects: model and data as the stages of a job take them, and the objects untouched."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from layerlens.config import DataConfig, RunConfig
from layerlens.data import Dataset, load_dataset
from layerlens.data.labels import in_order_of
from layerlens.data.read import dataset_of
from layerlens.data.rows import SourceRows
from layerlens.exceptions import ConfigurationError, DataError
from layerlens.integrations.audio_input import audio_input, extractor_in
from layerlens.integrations.layers import model_spec, of_tokens_alone
from layerlens.integrations.new_head import new_head_of
from layerlens.integrations.placement import input_device
from layerlens.integrations.pretrained import ImageInput, PretrainedModel, mode_for, tokenizer_of
from layerlens.integrations.quantized_loading import notes_on
from layerlens.integrations.token_embeddings import with_tokens
from layerlens.integrations.torch_modules import in_evaluation_mode
from layerlens.integrations.transformers import longest_sequence, output_names
from layerlens.jobs.inputs import calibration_samples, check_model, split_samples, statistics_request
from layerlens.jobs.job import Job, Warn, Warnings, unheard
from layerlens.jobs.load import Loaded, load
from layerlens.jobs.memory_mode import PLAIN, MemoryPlan
from layerlens.library import given, samples, trainers
from layerlens.library.objects import Objects
from layerlens.library.sentences import of_sentence_model
from layerlens.library.settings import by_section, configuration
from layerlens.library.single_losses import single_losses
from layerlens.library.trainers import is_trainer
from layerlens.library.untouched import random_states_kept, untouched
from layerlens.models import ModelSpec
from layerlens.optimization.constraints import without_idle_layers
from layerlens.profiling.head import fit_head
from layerlens.registry import TASKS
from layerlens.sources.factory import first_argument
from layerlens.tasks import Batch, Task, make_batches, task_for
from layerlens.tasks.encoded import notes_of
from layerlens.tasks.guess import with_task
from layerlens.tasks.lengths import lowered
from layerlens.tasks.losses import BatchLoss, own_loss
from layerlens.tasks.text import padding_id
from layerlens.utils.grad_mode import gradients_on
from layerlens.utils.progress import Progress, silent
from layerlens.utils.threads import set_threads

IN_MEMORY = MemoryPlan(PLAIN, "the model was given in memory", {})
LABELS_ADVICE = "load the model with num_labels, id2label and label2id of the data, or map them in data.label_names"
TOLD = {"columns": "columns ", "tokens": "tokens ", "classes": "classes ", "note": ""}
"""Of what is known of the data, what the other notes do not say."""
UNKNOWN_SIZE = 2**31


@dataclass(frozen=True)
class LoadedObjects(Loaded):
    """What a program gave, ready to be measured.

    Args:
        head_batches: for a new head, of data that came as batches.
        head_loss: of each sample, to fit it with; None where there is none.
        of_batches: whether the data came as batches, so that there are no samples to make others of.
        notes: what the user should know.
    """

    head_batches: tuple[Batch, ...] = ()
    head_loss: Any = None
    of_batches: bool = False
    notes: tuple[str, ...] = ()

    @property
    def in_memory(self) -> bool:
        """They are."""
        return True


@contextmanager
def opened(
    objects: Objects, settings: Mapping[str, Any], *, budget_needed: bool, progress: Progress = silent,
    warn: Warn = unheard,
) -> Iterator[tuple[Job, Loaded]]:  # fmt: skip
    """The job and what it measures; afterwards the program's objects are as they were.

    Raises:
        LayerLensError: with one line that says what to do.
    """
    if is_trainer(objects.model):
        more: dict[str, Any] = {"budget_needed": budget_needed, "progress": progress, "warn": warn}
        with of_trainer(objects, settings, budget_needed) as inside, opened(inside, settings, **more) as found:
            yield found
        return
    threads = by_section(settings).get("runtime", {}).get("threads") or torch.get_num_threads()
    warnings = Warnings(warn)
    if isinstance(objects.model, (str, Path)):
        with gradients_on(), random_states_kept():
            config, guess = with_task(_config_by_name(objects, settings, budget_needed), Path.cwd())
            if guess is not None:
                warnings.add(str(guess))
            shorter, lengths = lowered(config.model, config.data, config.optimization, Path.cwd())
            config = config.model_copy(update=shorter)
            if lengths:
                warnings.add(lengths)
            job = Job(config, Path.cwd(), Path(), progress, warnings, threads=threads)
            yield job, load(job)
        return
    objects = of_sentence_model(objects)
    model = given.bare_model(objects.model)
    head = new_head_of(model, given.task_of_model(model, objects.task)[0], objects.new_head)
    new = head.parameters
    with gradients_on(), untouched(model, new):
        set_threads(threads)
        model.requires_grad_(False)
        with in_evaluation_mode(model):
            config, loaded = _loaded(objects, model, new, settings, budget_needed, warnings)
            job = Job(config, Path.cwd(), Path(), progress, warnings, threads=threads, device=str(input_device(model)))
            if new:
                modules = ", ".join(head.modules)
                warnings.add(f"new head: {modules}: {head.why}; training updates it, and it is saved with the adapter")
                loaded = replace(loaded, heads=head.modules)
            if new and loaded.head_loss is not None and loaded.head_batches:
                fit_head(model, new, loaded.head_batches, progress, loaded.head_loss)
                loaded.new_head.fitted = True
            elif new and loaded.of_batches:
                warnings.add(
                    "new head: it keeps its initial weights while measuring, because no data are left to fit it"
                )
            for note in (*notes_on(model), *loaded.notes):
                warnings.add(note)
            yield job, loaded


@contextmanager
def of_trainer(objects: Objects, settings: Mapping[str, Any], budget_needed: bool) -> Iterator[Objects]:
    """The model, batches and loss of a trainer as objects; it is as before afterwards.

    Raises:
        ConfigurationError: data or a loss is given beside it, or it cannot be planned for.
        ProfilingError: a statistic by sample is asked for, and its loss has no part for each sample.
    """
    trainer: Any = objects.model
    for name in ("data", "loss", "tokenizer", "collator"):
        if getattr(objects, name) is not None:
            raise ConfigurationError(
                f"{name}: a {type(trainer).__name__} has its own; leave it out, or give trainer.model in its place"
            )
    config = configuration(
        settings, model={"name_or_path": "object:trainer", "task": objects.task or "causal-lm"},
        data={"source": "object:trainer"}, budget_needed=budget_needed,
    )  # fmt: skip
    rows, size = trainer.train_dataset, trainer.args.train_batch_size
    n_samples = calibration_samples(config, len(rows) if hasattr(rows, "__len__") else UNKNOWN_SIZE)
    n_batches = max(samples.FEWEST_BATCHES, -(-n_samples // size))
    task = given.task_of_model(trainer.model, objects.task)[0]
    if new_head_of(trainer.model, task, objects.new_head).parameters:
        n_batches += -(-config.model.head_fit_samples // size)
    with trainers.opened(trainer, n_batches, by_section(settings).get("runtime", {}).get("seed")) as found:
        by_sample = any(one.by_samples for one in statistics_request(config).statistics)
        batches = single_losses(found, n_samples).batches if by_sample else found.batches
        yield replace(
            objects, model=found.model, data=samples.OfTrainer(batches, rows, size, type(trainer).__name__),
            trainer_loss=found.loss, trainer_loss_name=f"the loss of {found.loss_name}", batches_are_samples=by_sample,
            notes=found.notes,
        )  # fmt: skip


def _config_by_name(objects: Objects, settings: Mapping[str, Any], budget_needed: bool) -> RunConfig:
    if not isinstance(objects.data, (str, Path)):
        raise ConfigurationError(
            "data: LayerLens loads a model given by name, and then reads the data too; give a file's path or a data "
            "set's name, or load the model yourself and give it"
        )
    model = {"name_or_path": str(objects.model)} | ({"task": objects.task} if objects.task else {})
    return configuration(settings, model=model, data={"source": str(objects.data)}, budget_needed=budget_needed)


def _loaded(
    objects: Objects, model: torch.nn.Module, new: tuple[str, ...], settings: Mapping[str, Any], budget_needed: bool,
    warnings: Warnings,
) -> tuple[RunConfig, LoadedObjects]:  # fmt: skip
    task, said = given.task_of_model(model, objects.task)

    source = objects.data if isinstance(objects.data, (str, Path)) else f"object:{type(objects.data).__name__}"

    def config_with(length: int | None = None, kind: Task | None = task) -> RunConfig:
        own = {"loss": _function_name(objects.loss)} if kind is None or kind.name == given.CUSTOM else {}
        facts = {"name_or_path": given.reference_of(model), "task": given.CUSTOM if kind is None else kind.name, **own}
        facts |= {"dtype": given.dtype_of(model)}
        return configuration(
            settings, model=facts, data={"source": str(source)}, length=length, budget_needed=budget_needed
        )

    config = config_with()
    pretrained = _with_tokens(_pretrained(objects, model, new), config)
    if isinstance(objects.data, (str, Path)):
        kind = _needed(task, model)
        dataset = load_dataset(config.data, Path.cwd(), kind.name)
        return _of_rows(objects, config_with, pretrained, kind, said, dataset, warnings)
    loss: list[given.GivenLoss] = []

    def wanted(total: int | None, first: Any) -> int:
        batch = given.as_batch(model, first, 0, input_device(model))
        loss.append(_loss(objects, model, batch, first, task, said))
        n = calibration_samples(config, total if total is not None else UNKNOWN_SIZE)
        return max(n, samples.FEWEST_BATCHES * samples.size_of(first)) if loss[0].by_batches else n

    taken = samples.take(
        objects.data, wanted=wanted, spare=config.model.head_fit_samples if new else 0,
        batch_size=config.data.batch_size, tokenizer=pretrained.tokenizer, collator=objects.collator,
        seed=config.runtime.seed,
    )  # fmt: skip
    if taken.rows is not None:
        kind = _needed(task, model)
        found = dataset_of(SourceRows.of(taken.rows), str(source), config.data, kind.read)
        dataset = replace(found, description=taken.said)
        objects = replace(objects, notes=(*objects.notes, *taken.notes))
        return _of_rows(objects, config_with, pretrained, kind, said, dataset, warnings)
    return _of_batches(objects, config_with, pretrained, task, said, taken, loss[0])


def _needed(task: Task | None, model: torch.nn.Module) -> Task:
    if task is None:
        raise ConfigurationError(
            f"task: cannot be inferred from the class {type(model).__name__}; give task=, one of {', '.join(TASKS)}, "
            "or batches with a loss"
        )
    return task


def _of_rows(
    objects: Objects, config_with: Callable[..., RunConfig], pretrained: PretrainedModel, task: Task, said: str,
    dataset: Dataset, warnings: Warnings,
) -> tuple[RunConfig, LoadedObjects]:  # fmt: skip
    """As ``layerlens run`` does with the rows of a file."""
    config = config_with(_length_limit(pretrained), task)
    if task.inputs in ("text", "words") and pretrained.tokenizer is None:
        raise DataError(f"tokenizer: is needed to make the model's inputs of the {task.inputs} in these rows")
    if task.inputs == "image" and pretrained.images is None and pretrained.processor is None:
        raise DataError("tokenizer: give the model's image processor, or a transform from an image to a tensor")
    if line := _with_padding_token(pretrained):
        warnings.add(line)
    check_model(pretrained, config)
    if (dataset.task and dataset.task != task.name) or objects.sentence is not None:
        task = task_for(config.model, None, dataset)
    if task.classes:
        names = output_names(getattr(pretrained.model, "config", None))
        dataset = in_order_of(dataset, names, advice=LABELS_ADVICE)
        pretrained = replace(pretrained, labels=dataset.label_names)
    if objects.loss is not None:
        task = replace(task, loss=own_loss(objects.loss, _function_name(objects.loss)))
    calibration, head_data, held_out = split_samples(dataset, config, warnings)
    if not pretrained.new_parameters:
        head_data = head_data.select([])
    batches = make_batches(
        task, pretrained, calibration, config.data, batch_size=config.data.batch_size, seed=config.runtime.seed,
        limit=len(calibration),
    )  # fmt: skip
    for line in (*dataset.notes, *notes_of(batches.features)):
        warnings.add(line)
    notes = (
        *objects.notes,
        f"task: {task.name} ({said})",
        f"data: {len(calibration)} of {len(dataset)} samples measured",
    )
    loaded = LoadedObjects(
        pretrained, dataset, calibration, head_data, held_out, batches,
        _spec(pretrained, config, batches.typical.inputs), IN_MEMORY, task, statistics_request(config),
    )  # fmt: skip
    read = loaded.summary(config.data)
    facts = [] if read is None else [f"data: {TOLD[name]}{said}" for name, said in read.facts() if name in TOLD]
    return config, replace(loaded, notes=(*notes, *facts))


def _of_batches(
    objects: Objects, config_with: Callable[..., RunConfig], pretrained: PretrainedModel, task: Task | None, said: str,
    taken: samples.Taken, loss: given.GivenLoss,
) -> tuple[RunConfig, LoadedObjects]:  # fmt: skip
    """Batches as the data loader, collator or trainer made them."""
    model, device = pretrained.model, input_device(pretrained.model)
    dropped: dict[str, None] = {}
    batches, head_batches = (_converted(model, raw, device, dropped) for raw in (taken.batches, taken.more))
    digest = samples.digest_of(batches)
    known = task if task is not None else TASKS[given.CUSTOM]
    if objects.trainer_loss is not None:
        dropped.clear()  # the trainer's loss takes them
        batches = [replace(one, inputs=raw) for one, raw in zip(batches, taken.batches, strict=True)]
    n = len(batches) if loss.by_batches else sum(len(one.index) for one in batches)
    first = given.in_units(batches)[0] if loss.by_batches else batches[0]
    whole = loss.loss if isinstance(loss.loss, BatchLoss) else None
    example = first.inputs if whole is None else given.example_of(model, partial(whole.of_model, model, first))
    config = config_with(max(2, example["input_ids"].shape[-1]) if "input_ids" in example else None, task)
    _refuse_what_needs_samples(config, loss, of_trainer=objects.trainer_loss is not None)
    spec = _spec(pretrained, config, example)
    outputs: Any = getattr(getattr(model, "config", None), "id2label", None)
    labels = tuple(map(str, (outputs or {}).values())) if known.classes else ()
    calibration = Batched({}, (None,) * n, labels, taken.said, digest)
    notes = [*objects.notes, f"data: {taken.said} measured", f"loss: {loss.said}", *taken.notes]
    if task is not None:
        notes.insert(len(objects.notes), f"task: {task.name} ({said})")
    if dropped:
        notes.append(
            f"data: the model does not accept {', '.join(dropped)} from the batches, so LayerLens leaves these out"
        )
    fits = bool(head_batches) and known.new_head and given.has_sample_loss(model, known, head_batches[0])
    head_loss = known.loss if fits else None
    return config, LoadedObjects(
        replace(pretrained, labels=labels), calibration, calibration, calibration.none(), calibration.none(),
        given.in_units(batches) if loss.by_batches else batches,
        spec, IN_MEMORY, replace(known, loss=loss.loss), statistics_request(config), head_batches=tuple(head_batches),
        head_loss=head_loss, of_batches=True, notes=tuple(notes), example=example,
    )  # fmt: skip


def _refuse_what_needs_samples(config: RunConfig, loss: given.GivenLoss, *, of_trainer: bool) -> None:
    """Refuse what has to make batches of its own, or to take single samples apart, where the data came as batches.

    Raises:
        ConfigurationError: names the setting, and what would work.
    """
    for name, wanted in (
        ("proxies", config.profiling.proxies.options),
        ("proxy_check", config.optimization.proxy_check.steps),
    ):
        if wanted:
            raise ConfigurationError(
                f"{name}: needs samples that are not used for measuring, and the data came as batches; give rows with "
                "a tokenizer, or leave it out"
            )
    start = config.optimization.lora_initialization
    if of_trainer and start != "default":
        raise ConfigurationError(
            f"lora_initialization: {start!r} cannot be measured on a trainer's batches; leave it out, or give the "
            "model and batches with a loss of each sample"
        )
    if start == "gradient_svd" and loss.by_batches:
        raise ConfigurationError(
            f"lora_initialization: {start!r} needs a loss of each sample, and {loss.loss_name} is one number for a "
            "batch; leave it out, or give a loss of each sample"
        )


@dataclass(frozen=True)
class Batched(Dataset):
    """Samples that came as batches: how many, and a digest of what they hold."""

    digest: str = ""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the tensors of all batches."""
        return self.digest

    def none(self) -> Batched:
        """No samples."""
        return replace(self, labels=())


def _loss(
    objects: Objects, model: torch.nn.Module, batch: Batch, raw: Any, task: Task | None, said: str
) -> given.GivenLoss:
    trainer_loss = objects.trainer_loss
    if trainer_loss is None:
        return given.loss_for(model, batch, task, objects.loss, said)
    whole = BatchLoss(
        lambda model, batch: trainer_loss(model, batch.inputs), objects.trainer_loss_name, objects.batches_are_samples
    )
    what = "single samples" if objects.batches_are_samples else "whole batches"
    return given.GivenLoss(whole, f"{objects.trainer_loss_name}, for {what}, as in its training")


def _converted(
    model: torch.nn.Module, raws: Sequence[Any], device: torch.device, dropped: dict[str, None]
) -> list[Batch]:
    """Batches with the inputs that the model takes; names of the others go into ``dropped``."""
    found, n = [], 0
    for raw in raws:
        batch = given.as_batch(model, raw, n, device)
        n += len(batch.index)
        extra = given.untaken(model, batch.inputs)
        dropped.update(dict.fromkeys(extra))
        found.append(replace(batch, inputs={name: x for name, x in batch.inputs.items() if name not in extra}))
    return found


def _spec(pretrained: PretrainedModel, config: RunConfig, inputs: Mapping[str, torch.Tensor]) -> ModelSpec:
    """The layers without those of a new head, which is trained in full."""
    spec = model_spec(
        pretrained, config.model.reference, adapter_sites=config.profiling.adapter_sites,
        inputs=None if of_tokens_alone(inputs) else inputs, methods=config.optimization.methods,
        only=config.profiling.layers,
    )  # fmt: skip
    spec = without_idle_layers(spec, config.optimization.constraints.rules)
    new = pretrained.new_parameters
    layers = [layer for layer in spec.layers if not any(name.startswith(f"{layer.name}.") for name in new)]
    return replace(spec, layers=layers)


def _pretrained(objects: Objects, model: torch.nn.Module, new: tuple[str, ...]) -> PretrainedModel:
    """The model with a copy of its tokenizer, whose settings may then be changed."""
    processor, reference = objects.tokenizer, given.reference_of(model)
    if processor is None:
        return PretrainedModel(model, None, reference, new)
    if (extractor := extractor_in(processor, model)) is not None:
        own = None if extractor is processor else tokenizer_of(copy.deepcopy(processor))
        return PretrainedModel(model, own, reference, new, audio=audio_input(extractor, first_argument(model)))
    if hasattr(processor, "tokenizer") and hasattr(processor, "apply_chat_template"):
        whole = copy.deepcopy(processor)
        return PretrainedModel(model, tokenizer_of(whole), reference, new, processor=whole)
    if hasattr(processor, "convert_tokens_to_ids"):
        tokenizer = tokenizer_of(copy.deepcopy(processor))
        return PretrainedModel(model, tokenizer, reference, new, sentence=objects.sentence)
    of_transformers = hasattr(processor, "preprocess") or hasattr(processor, "image_processor")

    def transform(images: Sequence[Any]) -> Any:
        if of_transformers:
            return processor(images=list(images), return_tensors="pt")["pixel_values"]
        return torch.stack([torch.as_tensor(processor(image)) for image in images])

    mode = mode_for(getattr(getattr(model, "config", None), "num_channels", 3))
    return PretrainedModel(model, None, reference, new, images=ImageInput(transform, first_argument(model), mode))


def _with_tokens(pretrained: PretrainedModel, config: RunConfig) -> PretrainedModel:
    """The same, with the rows of ``trainable_tokens`` among what is trained.

    Raises:
        ConfigurationError: the embeddings are to be resized, which changes the program's own model.
        ModelSpecError: a token is unknown, or PEFT cannot train its row.
    """
    if config.model.resize_token_embeddings:
        raise ConfigurationError(
            "resize_token_embeddings: LayerLens does not change your model; call "
            "model.resize_token_embeddings(len(tokenizer)) first, and name the new tokens: trainable_tokens=[...]"
        )
    if not config.model.trainable_tokens:
        return pretrained
    return replace(pretrained, tokens=with_tokens(pretrained.model, pretrained.tokenizer, config.model.token_request))


def _with_padding_token(pretrained: PretrainedModel) -> str:
    """Give the configuration a padding token while measuring; a note for the user where it has none.

    Classifiers of decoders need it to find the last token of each text. The configuration is restored afterwards.
    """
    config: Any = getattr(pretrained.model, "config", None)
    if pretrained.tokenizer is None or not hasattr(config, "get_text_config"):
        return ""
    lacking = [one for one in (config, config.get_text_config()) if getattr(one, "pad_token_id", 0) is None]
    for one in lacking:
        one.pad_token_id = padding_id(pretrained.tokenizer)
    if not lacking or not type(pretrained.model).__name__.endswith("ForSequenceClassification"):
        return ""
    token = padding_id(pretrained.tokenizer)
    return (
        "model: its configuration has no pad_token_id, without which it takes no batch; LayerLens measures with "
        f"{token}; set model.config.pad_token_id = {token} before you train"
    )


def _length_limit(pretrained: PretrainedModel) -> int | None:
    """The longest sequence where the model has fewer positions than the default; None where the default does."""
    limit = longest_sequence(pretrained.model) if pretrained.tokenizer is not None else None
    default = DataConfig.model_fields["max_length"].default
    return limit if limit is not None and limit < default else None


def _function_name(function: Any) -> str:
    """A function as a configuration names one."""
    name = re.sub(r"\W", "_", getattr(function, "__qualname__", type(function).__qualname__))
    return f"{getattr(function, '__module__', None) or 'object'}:{name.lstrip('0123456789') or 'loss'}"
