"""One task with everything that belongs to it: columns, inputs, targets, loss, metrics and model class.

No other part of LayerLens depends on the name of a task. To add a task, write a file with a ``Task`` and register its
name in ``layerlens.registry.TASKS``.
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
    """The reason why rows fit a task.

    Args:
        columns: number of columns whose names and values fit the task. The claim with the largest number wins.
        why: what was found, in a few words.
    """

    columns: int
    why: str


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        name: name of the task in configurations.
        description: the task and its samples, for the documentation of the configuration.
        inputs: column of a data set from which the samples are made: "text" or "words" (the model has a tokenizer),
            "image" (it has an image processor), "audio" (it has a feature extractor), or another name (it has any of
            these).
        read: function from the rows of a source to a data set.
        claim: (rows, data configuration) -> the reason why the rows fit the task (see ``Claim``), or None if they do
            not. None instead of a function: the user must name the task.
        encode: (model, data set, data configuration, seed) -> one mapping for each sample, with its target under
            "labels".
        collate: (model, several of these mappings) -> ``Batch.inputs`` and ``Batch.labels``.
        loss: function that returns the loss of each sample, [b]. The loss of a sample must not depend on the others in
            its batch, unless ``coupled``.
        metrics: the metrics of the task.
        auto_class: class of transformers that loads a model for the task; "" if transformers has none.
        class_endings: endings of the names of model classes with a head for the task, in addition to the ending that
            follows from ``auto_class`` (``AutoModelForMaskedLM``: ``ForMaskedLM``).
        new_head: True if a pretrained model lacks the head, so LayerLens fits one before measuring.
        classes: True if the head has one output for each class of the data.
        head_config: further settings of transformers for a new head.
        peft_type: PEFT's name for the task, if PEFT has one and there is a head to train. Not QUESTION_ANS: PEFT's
            model (0.21) drops ``token_type_ids``, which changes the logits of BERT.
        model_targets: arguments by which the model takes the targets for its own loss. Several arguments take one
            column of the labels each. Empty if ``loss`` is used for training.
        token_labels: True if each token has a label. A mean loss is then a mean over the labelled tokens.
        shift: number of tokens by which a prediction precedes its label (1 for the next token).
        synthetic_labels: token ids [b, t] -> labels of synthetic samples, to measure costs with; None if the samples
            are not tokens.
        load: (data configuration, folder that relative paths start from) -> the data set, if its sources are not rows.
        read_folder: (folder, data configuration) -> the data set, if a folder of files can be one.
        claims_folder: function that returns True if a folder fits this task better than other tasks that read folders.
        file_suffixes: suffixes of the files that only this task reads, with ``load``.
        of_classes: function that converts a built-in data set of samples with classes; None if the task cannot use it.
        reference: (model, pretrained, encoded samples, batch size) -> None. Stores the reference values of the loss in
            the samples, from the unchanged model. None if the loss has no reference.
        no_study: the reason why ``layerlens evaluate`` cannot stack several trainings of the task, as the end of a
            sentence. "" if it can: samples, padded to one length, are rows of tensors with a loss of their own.
        right: (output, targets) -> float [b], the share of each sample that is predicted correctly, for studies; None
            if targets are classes, tags, tokens or numbers.
        row_names: names of the rows of a sample that has several. The last name also stands for all further rows.
        coupled: True if the loss of a sample depends on the others in its batch. LayerLens then measures whole batches.
        configure: (task, model configuration, data set) -> the task with the configured loss.
        of_images: name of the corresponding task for images; "" if there is none.
        alone: True if LayerLens must measure each sample in its own batch, because its inputs have no batch axis.
        tokens: True if a model for sound or images also has a tokenizer.
        generate: (model, batch) -> the model's generated output. Metrics get it as ``generated``.
        vocabulary_head: True if a new head has one output for each token of that tokenizer.
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
        """Endings of the names of model classes with a head for the task."""
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
