"""One task, with everything that belongs to it: its columns, inputs, targets, loss, metrics and model class.

Nothing else in LayerLens asks a task for its name. A new one is a file with a ``Task`` and a name in
``layerlens.registry.TASKS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlens.config import DataConfig, ModelConfig
from layerlens.data.dataset import Dataset
from layerlens.data.table import Table
from layerlens.exceptions import DataError, TrainingError
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.registry import TASKS
from layerlens.tasks.batches import Batches, Collate, Features
from layerlens.tasks.encoded import Encoded
from layerlens.tasks.losses import Loss, own_loss
from layerlens.tasks.metrics import LOSS_ONLY, Metrics
from layerlens.tasks.token_ids import check_token_ids
from layerlens.utils.user_code import load_function

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Claim:
    """Why rows look as if they were for a task.

    Args:
        columns: how many columns it would read whose names and values are what it expects; of several claims the one
            with most is right.
        why: what was found, in a few words.
    """

    columns: int
    why: str


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        name: as configurations have it.
        description: what it is and what its samples are, for the configuration's documentation.
        inputs: the column of a data set that its samples are made of: "text" or "words" (the model comes with a
            tokenizer), "image" (with an image processor), "audio" (with a feature extractor), or another (with any of
            these).
        read: from the rows of a source to a data set.
        claim: (rows, data configuration) -> why the rows look as if they were for it, if they do (see ``Claim``); None
            for a task that must be named.
        encode: (model, data set, data configuration, seed) -> one mapping for each sample, its target under "labels".
        collate: (model, some of those) -> ``Batch.inputs`` and ``Batch.labels``.
        loss: of each sample, which must not depend on the others in its batch.
        metrics: what it is judged by.
        auto_class: the class of transformers that loads a model for it; "" where transformers has none.
        class_endings: how the names of model classes with a head for it end, without what follows from ``auto_class``
            (``AutoModelForMaskedLM``: ``ForMaskedLM``).
        new_head: whether a pretrained model lacks the head for it, which is then fitted before measuring.
        classes: whether the head has an output for each class of the data.
        head_config: what else transformers needs to know to make the head.
        peft_type: PEFT's name for it, where PEFT has one and there is a head to train, which PEFT then finds. Not
            QUESTION_ANS: its model (0.21) takes ``token_type_ids`` and drops them, which changes the logits of BERT.
        model_targets: the arguments by which the model takes the targets for a loss of its own, each a column of the
            labels where there are several; none where it is trained with ``loss``.
        token_labels: whether there is a label for each token; a mean loss is then one over labelled tokens.
        shift: how many tokens before its own a label is predicted (1 for the next token).
        synthetic_labels: token ids [b, t] -> labels of made-up samples, to measure costs on; None where its samples
            are something else than tokens.
        load: (data configuration, folder that relative paths start from) -> the data set, where its sources are not
            rows.
        read_folder: (folder, data configuration) -> the data set, where a folder of files is one.
        claims_folder: whether a folder looks as if it were for the task, more than for others that read folders.
        file_suffixes: of files that only it reads, by ``load``.
        of_classes: what it makes of a built-in data set of samples with classes; None where it can do nothing with it.
        reference: (model, pretrained, encoded samples, batch size) -> None: notes in the samples what the loss compares
            the model with, of the model as it is; None where the loss compares it with nothing.
        no_study: why ``layerlens evaluate`` cannot stack several trainings of it, as the end of a sentence; "" where
            it can: padded to one length, samples are rows of tensors, each with a loss of its own.
        right: (output, targets) -> float [b], how much of each sample is predicted right, for studies; None where
            targets are classes, tags or tokens, or numbers.
        row_names: what the rows of a sample are called, where it is several; the last one stands for further ones.
        coupled: whether the loss of a sample depends on the others in its batch, so that it is measured batch by batch.
        configure: (task, model configuration, data set) -> the task with what the configuration says of its loss.
        of_images: name of the task that is this one on images; "" where there is none.
        alone: whether each sample is measured in a batch of its own, as its inputs have no axis of samples.
        tokens: whether a model of sound or images also comes with a tokenizer.
        generate: (model, batch) -> what the model writes by itself for it, which metrics are given as ``generated``.
        vocabulary_head: whether a new head has an output for each token of that tokenizer.
    """

    name: str
    description: str
    inputs: str
    read: Callable[[Table, DataConfig], Dataset]
    encode: Callable[[PretrainedModel, Dataset, DataConfig, int], list[Features]]
    collate: Collate
    loss: Loss
    metrics: Metrics = LOSS_ONLY
    auto_class: str = ""
    class_endings: tuple[str, ...] = ()
    new_head: bool = False
    classes: bool = False
    head_config: Mapping[str, Any] = field(default_factory=dict)
    peft_type: str | None = None
    model_targets: tuple[str, ...] = ("labels",)
    token_labels: bool = False
    shift: int = 0
    synthetic_labels: Callable[[torch.Tensor], torch.Tensor] | None = None
    load: Callable[[DataConfig, Path | None], Dataset] | None = None
    read_folder: Callable[[Path, DataConfig], Dataset] | None = None
    claim: Callable[[Table, DataConfig], Claim | None] | None = None
    claims_folder: Callable[[Path], bool] | None = None
    file_suffixes: tuple[str, ...] = ()
    of_classes: Callable[[Dataset], Dataset] | None = None
    reference: Callable[[torch.nn.Module, PretrainedModel, Sequence[Features], int], None] | None = None
    no_study: str = ""
    right: Callable[[Any, Any], torch.Tensor] | None = None
    row_names: tuple[str, ...] = ("input",)
    coupled: bool = False
    configure: Callable[[Task, ModelConfig, Dataset | None], Task] | None = None
    of_images: str = ""
    alone: bool = False
    tokens: bool = False
    vocabulary_head: bool = False
    generate: Callable[[Any, Any], Any] | None = None

    @property
    def endings(self) -> tuple[str, ...]:
        """Endings of the names of model classes with a head for it."""
        return (*self.class_endings, *filter(None, [self.auto_class.removeprefix("AutoModel")]))

    def n_outputs(self, labels: Sequence[str]) -> int:
        """Outputs of its head for these classes; 0 where the model's own head stays."""
        return len(labels) if self.classes else int(self.head_config.get("num_labels", 0))


def task_for(config: ModelConfig, base_dir: Path | None = None, dataset: Dataset | None = None) -> Task:
    """The task of a configuration, with the loss that the configuration names where it names one.

    Args:
        config: names the task.
        base_dir: folder that relative paths start from.
        dataset: the samples, which may turn out to be for another task (preference pairs for DPO, chats about images).

    Raises:
        ConfigurationError: the loss cannot be imported.
    """
    task: Task = TASKS[(dataset.task if dataset is not None else "") or config.task]
    if task.configure is not None:
        return task.configure(task, config, dataset)
    if config.loss is None:
        return task
    return replace(task, loss=own_loss(load_function(config.loss, "model.loss", base_dir), config.loss))


def task_metrics(name: str) -> Metrics:
    """What the task of this name is judged by.

    Raises:
        TrainingError: there is none.
    """
    if name not in TASKS:
        raise TrainingError(f"no metrics for the task {name!r}; there are some for {', '.join(TASKS)}")
    metrics: Metrics = TASKS[name].metrics
    return metrics


def make_batches(
    task: Task,
    pretrained: PretrainedModel,
    dataset: Dataset,
    config: DataConfig,
    *,
    batch_size: int,
    seed: int = 0,
    limit: int | None = None,
) -> Batches:
    """The samples of ``dataset`` as the inputs and targets that ``task`` gives the model.

    Args:
        task: says what is input and what is target.
        pretrained: the model, and the tokenizer or image processor that belongs to it.
        dataset: the samples.
        config: longest sequences, and what else shapes the inputs.
        batch_size: samples in a batch.
        seed: of what is drawn (which tokens a masked language model has to find).
        limit: at most so many samples, where long texts are cut into several; spread evenly.

    Raises:
        DataError: a sample cannot be encoded, or none is left.
        ConfigurationError: the tokenizer lacks what the task needs, or has tokens that the model lacks.
    """
    features = task.encode(pretrained, dataset, config, seed)
    if isinstance(features, Encoded):
        features = features.spread(limit)
        if not features and len(dataset):
            reason = features.left_out.most_common(1)[0][0]
            raise DataError(f"data.source: none of the {len(dataset)} rows can be used: {reason}")
    check_token_ids(pretrained, features)
    return Batches(task.collate, pretrained, features, batch_size=1 if task.alone else batch_size)
