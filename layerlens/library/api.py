"""The verbs of the library, on the model, data and trainer that a program already has."""

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
    """Measure a model on a little data and choose, within budgets, what to adapt; the objects are left as they were.

    Args:
        model: a ``torch.nn.Module`` (of transformers, timm, your own), a ``SentenceTransformer``, a trainer with its
            own data and loss (``transformers.Trainer``, TRL's, sentence-transformers'), or the directory or name of a
            model.
        data: a DataLoader, a list or generator of batches, a ``datasets.Dataset``, rows, a map-style data set, or a
            file's path. Batches are mappings of the model's arguments with the targets under ``labels``, or (inputs,
            targets). None with a trainer.
        task: what the model is tuned for; by default what its class has a head for.
        loss: (output, targets) -> the loss of each sample, [batch], or one number, which is then measured by batches.
        tokenizer: makes inputs of rows with texts; for images the image processor or a transform.
        collator: from a list of samples to a batch.
        new_head: whether the task head is untrained, or names of its modules; found out when None. A new head is fitted
            while measuring, and is in ``modules_to_save``.
        progress: reports the long steps.
        settings: budgets (``max_trainable_params="1M"``, ``max_vram_gb=24``, ``max_flops``, ``max_latency_ms``),
            ``methods`` (by default LoRA alone, which every trainer and serving engine can use), ``lora_ranks``,
            ``calibration_samples``, ``max_length``, ``utility_model``, ``seed``, ``threads``, and every other key of
            the configuration by its name.

    Returns:
        the plan.

    Raises:
        LayerLensError: with one line that says what to do: no budget, no layer that can be adapted, no loss or one
            without a gradient, budgets that allow nothing.

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
    """Measure a model on a little data, once for any number of choices; arguments as of ``plan``, without budgets.

    Returns:
        what was measured; ``choose`` takes it, and its ``save`` writes it as one file.

    Raises:
        LayerLensError: with one line that says what to do; see ``plan``.

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
    """Choose within budgets from what was measured, certified as ``plan`` does; the model is not needed.

    Args:
        statistics: what ``profile`` gave, or the file that its ``save`` wrote; or the directory of an earlier run.
        model: the base model, where the plan is to be applied, saved, or made a LoraConfig without naming it again.
        settings: budgets, methods and other keys of the section optimization, by their names; ``utility_model``,
            ``seed`` and ``threads``.

    Raises:
        InfeasibleError: the budgets allow nothing; the message has the smallest that would do.
        ConfigurationError: no budget, an unknown argument, or one that is said when measuring.
        ActivationCacheError: the file cannot be used.
        ManifestError: nothing says what a file's statistics were measured with.

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
    """The plan that ``plan.save`` or ``layerlens run`` wrote.

    Args:
        directory: the directory, or its manifest.json.

    Raises:
        ConfigurationError: the directory has no manifest.
        ManifestError: it cannot be read.

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
