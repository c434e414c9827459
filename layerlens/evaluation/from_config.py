"""``layerlens evaluate``: the study of a configuration, from its model and data to tables and plots."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerlens.config import RunConfig
from layerlens.config.compatibility import refuse_conflicts
from layerlens.data import Dataset, load_dataset
from layerlens.data.dataset import FEWEST
from layerlens.data.labels import HEAD_ADVICE, in_order_of
from layerlens.evaluation.results import ResultsFile, arm_results
from layerlens.evaluation.study import Study
from layerlens.evaluation.study_report import study_markdown, write_gain_plot
from layerlens.evaluation.study_task import Samples, StudyTask
from layerlens.exceptions import ConfigurationError, DataError
from layerlens.integrations.arguments import untaken
from layerlens.integrations.audio_input import mask_of_frames
from layerlens.integrations.layers import model_spec
from layerlens.integrations.model_code import model_code
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.jobs.inputs import check_model
from layerlens.jobs.job import Job, Warn, Warnings, unheard
from layerlens.jobs.measure import HEAD_BATCH_SIZE
from layerlens.jobs.own_code import inputs_digest
from layerlens.jobs.result import observed, published
from layerlens.models import LORA
from layerlens.profiling.coupling import coupling
from layerlens.profiling.head import fit_head
from layerlens.sources import load_pretrained
from layerlens.tasks import TASKS, Task, task_for
from layerlens.tasks.encoded import notes_of
from layerlens.tasks.guess import with_task
from layerlens.tasks.lengths import lowered
from layerlens.utils.atomic import atomic_write_text, check_writable
from layerlens.utils.observer import observed_stage
from layerlens.utils.progress import Progress, silent
from layerlens.utils.threads import set_threads

RUNS_FILE, REPORT_FILE, PLOT_FILE = "runs.jsonl", "study.md", "gain-{budget}.svg"


@dataclass(frozen=True)
class StudyResult:
    """What a study found.

    Args:
        files: name -> path of what was written.
        arms: for each budget and arm: trainable parameters, chosen learning rate, mean test loss and metric.
        seconds: wall time, without what an earlier call had done.
    """

    files: dict[str, Path]
    arms: list[dict[str, Any]]
    seconds: float

    @property
    def metrics(self) -> dict[str, float]:
        """Test loss and metric of every arm at its learning rate, as experiment trackers have them."""
        figures = ("test_loss", "test_metric")
        return {f"{row['budget']}.{row['arm']}.{figure}": row[figure] for row in self.arms for figure in figures}


def evaluate_config(
    config: RunConfig, *, base_dir: Path, progress: Progress = silent, warn: Warn = unheard
) -> StudyResult:
    """Run the study of ``config.study``, or what is missing of it, and write its tables and plots.

    Every run is kept in ``runs.jsonl`` in the output directory as soon as it is done; called again, the study goes on.

    Raises:
        ConfigurationError: the directory holds another study's runs, or a budget is too small for any layer.
        LayerLensError: the model or the data cannot be used.
    """
    with (
        observed("evaluate", config) as outcome,
        published(config.output.directory, base_dir, resumes=True) as place,
    ):
        refuse_conflicts(config, "evaluate")
        check_writable(place.directory)
        config, guess = with_task(config, base_dir)
        if guess is not None:
            warn(str(guess))
            refuse_conflicts(config, "evaluate")
        shorter, lengths = lowered(config.model, config.data, config.optimization, base_dir)
        config = config.model_copy(update=shorter)
        if lengths:
            warn(lengths)
        threads = set_threads(config.runtime.threads)
        job = Job(config, base_dir, place.directory, progress, Warnings(warn), threads=threads)
        outcome.result = place.publish(_evaluate(job))
    return outcome.result


def _evaluate(job: Job) -> StudyResult:
    config, started = job.config, time.perf_counter()
    arms = config.study.arms
    with observed_stage("load"), job.progress.stage("Loading model and data"):
        task = study_task(job)
        budgets = _budgets(config, task)
    results = ResultsFile.open(job.output / RUNS_FILE)
    _refuse_other_study(results, config, task)
    with observed_stage("profile"), job.progress.stage("Measuring"):
        optimization = config.optimization
        study = Study(
            task, results, budgets, arms=arms, base_dir=job.base_dir, device=optimization.latency_profile,
            margin=optimization.quality_margin,
        )  # fmt: skip
        wanted = study.within_budgets(arms, job.warnings.add)
    runs = 1 + len(wanted)
    with observed_stage("train"), job.progress.stage("Training", total=runs) as advance:
        study.head_alone()
        advance(1)
        for budget, arm in wanted:
            study.run(budget, arm)
            advance(1)
    return _write(job.output, results, tuple(budgets), time.perf_counter() - started)


def study_task(job: Job) -> StudyTask:
    """The model with its head fitted, and the data in three parts, padded to ``data.max_length``.

    The test part is the one that `layerlens run` never measures on.
    """
    config, study, base_dir = job.config, job.config.study, job.base_dir
    dataset = load_dataset(config.data, base_dir, config.model.task)
    kind = task_for(config.model, base_dir, dataset)
    _refuse_unstudied(kind)
    pretrained = load_pretrained(
        config.model.reference, config.model.task, dataset.outputs, seed=config.runtime.seed, base_dir=base_dir,
        new_head=config.model.new_head, trust_remote_code=config.model.trust_remote_code,
        quantization=config.model.quantization, tokens=config.model.token_request or None,
        weights=config.model.weights, heads=config.model.head,
    )  # fmt: skip
    check_model(pretrained, config)
    if config.model.dtype != "float32":
        job.warnings.add(f"a study trains in float32; model.dtype: {config.model.dtype} is not used")
    dataset = in_order_of(dataset, pretrained.labels, advice=HEAD_ADVICE)
    parts = _parts(dataset, job)
    for line in (*pretrained.notes, *dataset.notes):
        job.warnings.add(line)
    samples = [_samples(kind, pretrained, part, job) for part in parts]
    _refuse_coupled(kind, pretrained, samples[1])
    if pretrained.new_parameters and len(samples[0]):
        batches = samples[0].batches(torch.arange(len(samples[0])), HEAD_BATCH_SIZE)
        fit_head(pretrained.model, pretrained.new_parameters, batches, job.progress, kind.loss)
    return StudyTask(
        name=config.model.task,
        model=pretrained.model,
        spec=model_spec(pretrained, config.model.reference),
        train=samples[1],
        validation=samples[2],
        test=samples[3],
        loss=kind.loss,
        heads=_heads(pretrained, kind, job),
        token_labels=kind.token_labels,
        shifted=kind.shift > 0,
        spans=len(kind.model_targets) > 1,
        right=kind.right,
        steps=study.steps,
        batch_size=study.batch_size,
        learning_rates=study.learning_rates,
        ranks=config.optimization.lora_ranks,
        seeds=tuple(range(study.seeds)),
        sweep_seeds=tuple(range(min(study.sweep_seeds, study.seeds))),
        arms_at_once=study.arms_at_once,
    )


def _refuse_unstudied(task: Task) -> None:
    """Refuse what the samples have turned out to be for."""
    if task.no_study:
        raise ConfigurationError(f"data.source: the samples are for {task.name}; no study of it, as {task.no_study}")


def _refuse_coupled(task: Task, pretrained: PretrainedModel, samples: Samples) -> None:
    """Refuse a loss that compares samples: several choices are trained in one batch."""
    few = samples.batches(torch.arange(min(8, len(samples))), 8)
    if said := coupling(pretrained.model, few, task.loss).said:
        raise ConfigurationError(f"{task.name}: no study, which trains several choices in one batch: {said}")


def _parts(dataset: Dataset, job: Job) -> tuple[Dataset, Dataset, Dataset, Dataset]:
    """Samples for fitting the head, training, validation and test."""
    config, study = job.config, job.config.study
    n_head = config.model.head_fit_samples if TASKS[config.model.task].new_head else 0
    wanted = study.train_samples + study.validation_samples
    rest, head = dataset.split(wanted, n_head, config.runtime.seed)
    if len(head) < n_head:  # a small data set: the head is fitted on training samples
        rest, head = dataset.split(wanted, 0, config.runtime.seed)
        n_head_taken = min(n_head, len(rest) // 4)
        head, rest = rest.select(list(range(n_head_taken))), rest.select(list(range(n_head_taken, len(rest))))
    n_validation = min(study.validation_samples, len(rest) // 4)
    validation = rest.select(list(range(n_validation)))
    train = rest.select(list(range(n_validation, len(rest))))
    _, test = dataset.split_test()
    digests = test.digests()
    test = test.select(sorted(range(len(test)), key=digests.__getitem__)[: study.test_samples])
    for name, part, asked in (
        ("train_samples", train, study.train_samples),
        ("validation_samples", validation, study.validation_samples),
        ("test_samples", test, study.test_samples),
    ):
        if len(part) < 2:
            raise DataError(f"data.source: {len(dataset)} samples leave {len(part)} for study.{name}; give more data")
        if len(part) < asked:
            job.warnings.add(f"study.{name}: asked for {asked}, the data has {len(part)}")
    return head, train, validation, test


def _samples(task: Task, pretrained: PretrainedModel, part: Dataset, job: Job) -> Samples:
    """All samples of a part in one batch: padded to the longest of them."""
    config = job.config
    if not len(part):
        return Samples({}, torch.zeros(0))
    features = task.encode(pretrained, part, config.data, config.runtime.seed)
    for line in notes_of(features):
        job.warnings.add(line)
    if len(features) < min(FEWEST, len(part)):
        raise DataError(f"data.source: of {len(part)} samples of one part of the study {len(features)} can be used")
    inputs, labels = task.collate(pretrained, features)
    taken = untaken(pretrained.model, inputs)
    inputs = {name: value for name, value in inputs.items() if name not in taken}
    if not isinstance(labels, torch.Tensor) and not hasattr(labels, "each_tensor"):
        raise ConfigurationError(
            f"data.source: a study of {task.name} takes targets that are one tensor [samples, ...], got "
            f"{type(labels).__name__}"
        )
    return Samples(inputs, labels, mask_of_frames(pretrained.model, inputs))


def _heads(pretrained: PretrainedModel, task: Task, job: Job) -> tuple[str, ...]:
    """The Linears of what is trained whole; what else it has stays as it is, which is said."""
    model = pretrained.model
    trained = pretrained.trained_modules(task_head=task.new_head or bool(pretrained.new_parameters))
    found = [
        name
        for head in trained
        for name, module in model.get_submodule(head).named_modules(prefix=head)
        if isinstance(module, torch.nn.Linear)
    ]
    inside = tuple(f"{name}." for name in found)
    others = [
        name
        for head in trained
        for name, _ in model.get_submodule(head).named_parameters(prefix=head)
        if not name.startswith(inside)
    ]
    if others:
        job.warnings.add(
            f"a study trains the Linear layers of a task head; {len(others)} other parameters of it stay as they are"
            f"{' fitted' if pretrained.new_parameters else ''} in all arms ({', '.join(others[:3])}"
            f"{' ...' if len(others) > 3 else ''})"
        )
    return tuple(found)


def _budgets(config: RunConfig, task: StudyTask) -> dict[str, int]:
    """Name of each budget -> trainable parameters."""
    given: Sequence[float] = config.study.budgets or (config.optimization.max_trainable_params or 0,)
    budgets = {
        f"{value:g}": round(value * task.spec.total_params) if value < 1.0 else round(value) for value in given if value
    }
    least = min(layer.n_in + layer.n_out for layer in task.spec.layers if LORA in layer.methods)
    for name, size in budgets.items():
        if size < least:
            raise ConfigurationError(
                f"study.budgets: {name} is {size} parameters, and rank 1 on the smallest layer takes {least}"
            )
    return budgets


def _refuse_other_study(results: ResultsFile, config: RunConfig, task: StudyTask) -> None:
    """Runs of another model, data or training must not be mixed with these, nor of other code, weights or samples."""
    identity = config.model_dump(mode="json", include={"model", "data"}) | {
        "seed": config.runtime.seed,
        "ranks": list(config.optimization.lora_ranks),
        "study": config.study.model_dump(mode="json", exclude={"arms", "budgets", "arms_at_once", "learning_rates"}),
        "weights": task.spec.fingerprint,
        "code": model_code(task.model, {"model.loss": task.loss}).digest,
        "samples": [inputs_digest({**part.inputs, **_tensors_of(part.labels)})
                    for part in (task.train, task.validation, task.test)],
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    begun = results.select(kind="study")
    if not begun:
        results.append([{"kind": "study", "identity": digest, **identity}])
    elif begun[0]["identity"] != digest:
        changed = [key for key, value in identity.items() if begun[0].get(key) != value]
        raise ConfigurationError(
            f"output.directory: {results.path} has runs of another study ({', '.join(changed)} differ); give another "
            "directory, or remove the file"
        )


def _tensors_of(labels: Any) -> dict[str, torch.Tensor]:
    """The tensors of targets, by name."""
    if isinstance(labels, torch.Tensor):
        return {"labels": labels}
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    labels.each_tensor(note)
    return {f"labels {place}": tensor for place, tensor in enumerate(found)}


def _write(output: Path, results: ResultsFile, budgets: Sequence[str], seconds: float) -> StudyResult:
    files = {"runs": results.path}
    name = results.select(kind="reference", name="frozen")[0]["task"]
    files["report"] = atomic_write_text(output / REPORT_FILE, study_markdown({name: results}, budgets))
    rows = []
    for budget in budgets:
        path = output / PLOT_FILE.format(budget=budget)
        write_gain_plot({name: results}, budget, path, [name], {})
        files[f"plot_{budget}"] = path
        for arm, result in arm_results(results, budget).items():
            rows.append(
                {
                    "budget": budget,
                    "arm": arm,
                    "params": result.params,
                    "learning_rate": result.learning_rate,
                    "test_loss": float(result.test_loss.mean()),
                    "test_metric": float(result.test_metric.mean()),
                }
            )
    return StudyResult(files, rows, seconds)
