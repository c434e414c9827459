"""The functions of the library: plan, profile, choose and load, on a model, data and trainer in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from layerlens.exceptions import ActivationCacheError, ConfigurationError
from layerlens.integrations.parameter_account import account_of
from layerlens.jobs.choose import choose as choose_stage
from layerlens.jobs.choose import compare, train_jointly, train_proxies
from layerlens.jobs.data_facts import data_facts
from layerlens.jobs.decision import solve_stage
from layerlens.jobs.hours import told_in_hours, with_hours
from layerlens.jobs.job import Job, Warnings
from layerlens.jobs.load import Loaded
from layerlens.jobs.measure import Measured, fit_new_head, measure
from layerlens.jobs.recorded import manifest_at
from layerlens.jobs.result import STATISTICS_FILE
from layerlens.jobs.solve import make_manifest, run_provenance
from layerlens.library.objects import Objects
from layerlens.library.plan import Plan, weak
from layerlens.library.profile import Profile
from layerlens.library.session import opened
from layerlens.library.settings import with_settings
from layerlens.manifest import read_manifest
from layerlens.tuning.initialization import beginnings_unmeasured, measured_factors, read_factors
from layerlens.tuning.task_head import read_head
from layerlens.utils.progress import Progress, silent


def plan(
    model: Any,
    data: Any = None,
    *,
    task: str | None = None,
    loss: Callable[..., Any] | None = None,
    tokenizer: Any = None,
    collator: Callable[[list[Any]], Any] | None = None,
    new_head: bool | Sequence[str] | None = None,
    progress: Progress = silent,
    **settings: Any,
) -> Plan:
    """Measure a model on a small sample of data, and choose a method and rank for every layer within your budgets.

    LayerLens does not change the model, the data or the trainer.

    Args:
        model: a ``torch.nn.Module`` (from transformers, timm, or your own), a ``SentenceTransformer``, a trainer with
            its own data and loss (of transformers, TRL or sentence-transformers), or a model's directory or hub name.
        data: a DataLoader, a list or generator of batches, a ``datasets.Dataset``, a list of rows, a map-style data
            set, or the path of a file. A batch maps the names of the model's arguments and ``labels`` to tensors, or is
            a pair (inputs, targets). None if ``model`` is a trainer.
        task: the task to tune for; by default, the task of the head that the model's class has.
        loss: function (output, targets) -> loss. It returns a tensor [batch] with the loss of each sample, or one
            number. If it returns one number, LayerLens measures whole batches. By default, the loss of the task.
        tokenizer: encodes rows with texts; for images, the image processor or a transform.
        collator: function from a list of samples to a batch.
        new_head: True if the task head is untrained, or the names of its modules; by default, LayerLens finds out.
            LayerLens fits a new head before measuring, and lists it in ``modules_to_save``.
        progress: called with the progress of long steps.
        settings: budgets (``max_trainable_params="1M"``, ``max_vram_gb=24``, ``max_flops``, ``max_latency_ms``),
            ``methods`` (by default only LoRA, which every trainer and serving engine supports), ``lora_ranks``,
            ``calibration_samples``, ``max_length``, ``utility_model``, ``seed``, ``threads``, and any other key of the
            configuration. Memory is in GB (1e9 bytes), time in milliseconds.

    Returns:
        the plan.

    Raises:
        ConfigurationError: no budget, an unknown setting, or settings that contradict each other.
        DataError: the data is empty or of an unknown kind, or there is no loss for it.
        ModelSpecError: the model is already adapted, or has no layer that can be adapted.
        InfeasibleError: no choice fits the budgets; the message gives the smallest budgets that work.
        LayerLensError: every other error, with one line that says what to do.

    >>> from peft import get_peft_model
    >>> plan = layerlens.plan(model, loader, max_trainable_params="2k")
    >>> adapted = get_peft_model(model, plan.lora_config())
    >>> adapted.get_nb_trainable_parameters()[0] == plan.trainable_params <= 2000
    True
    >>> model = adapted.unload()  # the base model again
    """
    objects = Objects(model, data, task, loss, tokenizer, collator, new_head)
    with opened(objects, settings, budget_needed=True, progress=progress) as (job, loaded):
        measured = _measured(job, loaded)
        given = job.config
        job = replace(job, config=with_hours(given, measured.statistics))
        measured, trainings = train_proxies(job, loaded, measured)
        with told_in_hours(given, measured.statistics):
            decision = choose_stage(job, loaded, measured)
        decision = compare(job, loaded, measured, decision)
        decision = train_jointly(job, loaded, measured, decision, trainings)
        factors = measured_factors(
            loaded.pretrained.model, decision.manifest.choice, loaded.batches, loaded.task.loss,
            lambda: fit_new_head(job, loaded),
        )  # fmt: skip
        if unmeasured := beginnings_unmeasured(loaded.pretrained.model, decision.manifest.choice):
            job.warnings.add(unmeasured)
        notes = tuple(job.warnings.lines)
        found = Profile(measured.spec, measured.statistics, measured.model, job.config, notes)
        kept = weak(loaded.pretrained.model) if not isinstance(model, (str, Path)) else None
    return Plan(decision.manifest, found, notes, factors, decision.solution, kept)


def profile(
    model: Any,
    data: Any = None,
    *,
    task: str | None = None,
    loss: Callable[..., Any] | None = None,
    tokenizer: Any = None,
    collator: Callable[[list[Any]], Any] | None = None,
    new_head: bool | Sequence[str] | None = None,
    progress: Progress = silent,
    **settings: Any,
) -> Profile:
    """Measure a model once, to choose from the result as often as you like. The arguments are those of ``plan``.

    Budgets are not needed here.

    Returns:
        the measurements, for ``choose``. Their ``save`` writes them to one file.

    Raises:
        LayerLensError: as in ``plan``, without the errors about budgets.

    >>> statistics = layerlens.profile(model, loader)
    >>> small, large = (layerlens.choose(statistics, max_trainable_params=n) for n in (1000, 2000))
    >>> small.manifest.score < large.manifest.score
    True
    """
    objects = Objects(model, data, task, loss, tokenizer, collator, new_head)
    with opened(objects, settings, budget_needed=False, progress=progress) as (job, loaded):
        measured = _measured(job, loaded)
        return Profile(measured.spec, measured.statistics, measured.model, job.config, tuple(job.warnings.lines))


def _measured(job: Job, loaded: Loaded) -> Measured:
    """``measure``; a new head is among what is recorded of the model, whatever its task."""
    measured = measure(job, loaded)
    assert measured is not None
    heads, tokens = loaded.heads, loaded.pretrained.tokens
    if heads and tokens is not None:
        heads = (*heads, *tokens.whole_modules)
    if not heads or measured.model.heads == heads:
        return measured
    parameters = account_of(loaded.pretrained.model, measured.spec, heads)
    model = replace(measured.model, head_modules=heads, parameters=parameters)
    provenance = {**measured.statistics.provenance, "model": model.fields()}
    return replace(measured, model=model, statistics=replace(measured.statistics, provenance=provenance))


def choose(statistics: Profile | str | Path, model: Any = None, **settings: Any) -> Plan:
    """Choose within your budgets from measurements, with the same proof as ``plan``. The model is not needed.

    Args:
        statistics: the result of ``profile``, the file that its ``save`` wrote, or the directory of a run.
        model: the base model. If you give it, ``lora_config``, ``apply`` and ``save`` of the plan use it by default.
        settings: budgets, ``methods`` and other keys of the section ``optimization``; ``utility_model``, ``seed`` and
            ``threads``.

    Returns:
        the plan.

    Raises:
        InfeasibleError: no choice fits the budgets; the message gives the smallest budgets that work.
        ConfigurationError: no budget, an unknown argument, or an argument that belongs to ``profile``.
        ActivationCacheError: the file is missing, damaged, or of another format.
        ManifestError: neither the file nor a manifest beside it records the settings of the measurement.

    >>> plan = layerlens.choose(statistics, model, max_vram_gb=16, max_trainable_params="1k")
    >>> plan.manifest.status
    'optimal'
    """
    found = statistics if isinstance(statistics, Profile) else Profile.load(statistics)
    given = with_settings(found.config, settings)
    config = with_hours(given, found.statistics)
    job = Job(config, Path.cwd(), Path(), warnings=Warnings(), threads=max(1, config.runtime.threads))
    with told_in_hours(given, found.statistics):
        solution = solve_stage(job, found.spec, found.statistics)
    provenance = run_provenance(config, job.threads, data_facts(found.statistics))
    manifest = make_manifest(found.spec, solution, config.optimization, model=found.model, provenance=provenance)
    notes = (*found.notes, *job.warnings.lines)
    return Plan(manifest, replace(found, config=config), notes, None, solution, weak(model))


def load(directory: str | Path) -> Plan:
    """Load the plan that ``plan.save`` or ``layerlens run`` wrote.

    Args:
        directory: the directory, or the path of its manifest.json.

    Returns:
        the plan, without a model: pass the base model to ``lora_config``, ``apply`` and ``save``.

    Raises:
        ConfigurationError: the directory has no manifest.
        ManifestError: the manifest cannot be read.

    >>> files = plan.save("out")
    >>> layerlens.load("out").ranks == plan.ranks
    True
    """
    path = manifest_at(Path(directory).expanduser())
    manifest = read_manifest(path)
    notes: tuple[str, ...] = ()
    found: Profile | None = None
    statistics = path.parent / STATISTICS_FILE
    if statistics.is_file():
        try:
            found = Profile.load(statistics)
        except (ConfigurationError, ActivationCacheError) as error:
            notes = (f"the statistics beside the manifest cannot be used: {error}",)
    factors = read_factors(path.parent / "peft", manifest) if manifest.lora.is_measured else None
    return Plan(manifest, found, notes, factors, _head=read_head(path.parent))
