"""The third stage: from what was measured to the choice, trained against other choices where the configuration asks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from layerlens.config.optimization import CHEAPEST, UNIFORM_LORA
from layerlens.data import Dataset
from layerlens.jobs.cheapest_check import (
    candidates_of,
    cheapest_checked,
    told_of_cheapest,
    with_enough_steps,
)
from layerlens.jobs.data_facts import data_facts
from layerlens.jobs.decision import Decision, solve_stage, solved
from layerlens.jobs.inputs import check_identity, proxy_identity
from layerlens.jobs.job import Job
from layerlens.jobs.load import Loaded
from layerlens.jobs.measure import Measured, fit_new_head
from layerlens.jobs.memory_mode import memory_facts
from layerlens.jobs.proxies import ProxyTrainer, joint_gains, measure_proxies
from layerlens.jobs.proxy_check import (
    CHOICE,
    check_samples,
    run_check,
    tell_of_check,
    train_candidates,
    uniform_solution,
)
from layerlens.jobs.solve import Solution, make_manifest, run_provenance
from layerlens.models import Manifest
from layerlens.profiling.cache import cache_key


@dataclass
class Trainings:
    """Short trainings of the loaded model; the trainer is made when the first one is not in the cache.

    Args:
        job, loaded: what is trained, and how.
        train: samples to train on; the calibration samples when None.
        judged: samples to judge on.
        identity: everything that a training's result depends on beside what is trained.
        steps: of every training; those of the proxies when not given.
    """

    job: Job
    loaded: Loaded
    train: Dataset | None
    judged: Dataset
    identity: dict[str, Any]
    steps: int | None = None

    def __post_init__(self) -> None:
        cache, name = self.job.cache, self.loaded.spec.model_name
        self.saved = cache.saved_proxies(cache_key(self.identity), name, len(self.judged)) if cache else None

    @cached_property
    def _trainer(self) -> ProxyTrainer:
        job, loaded = self.job, self.loaded
        fit_new_head(job, loaded)
        train = loaded.batches if self.train is None else loaded.batches_of(job, self.train)
        judged = loaded.batches_of(job, self.judged)
        return ProxyTrainer(
            loaded.pretrained.model, loaded.spec, train, judged, loaded.task.loss, job.config, self.steps
        )

    def trainer(self) -> ProxyTrainer:
        """The trainer, with a new head fitted."""
        return self._trainer


def train_proxies(job: Job, loaded: Loaded, measured: Measured) -> tuple[Measured, Trainings]:
    """Train the options of ``profiling.proxies``, by which utilities are calibrated.

    Returns:
        what was measured, with the proxies' gains, and the trainings, for the whole choice to go through.
    """
    identity = proxy_identity(measured.identity, loaded.held_out, job.config)
    trainings = Trainings(job, loaded, None, loaded.held_out, identity)
    if job.config.profiling.proxies.options:
        with job.clock.stage("proxies"):
            study = measure_proxies(trainings.trainer, loaded.spec, job.config, trainings.saved, job.progress)
        measured = replace(measured, statistics=replace(measured.statistics, proxies=study))
    return measured, trainings


def choose(job: Job, loaded: Loaded, measured: Measured) -> Decision:
    """The certified choice within the budgets."""
    solution = solve_stage(job, measured.spec, measured.statistics)
    return Decision(solution, _manifest(job, loaded, measured, solution))


def compare(job: Job, loaded: Loaded, measured: Measured, decision: Decision) -> Decision:
    """The best of the choice and the candidates of ``optimization.proxy_check``, after all are trained a little."""
    config = job.config
    steps = config.optimization.proxy_check.steps
    if not steps:
        return decision
    if config.optimization.objective == CHEAPEST:
        return _compare_costs(job, loaded, measured, decision)
    with job.clock.stage("proxy check"):
        n_before = len(loaded.calibration) + len(loaded.held_out)
        train, judged = check_samples(loaded.dataset, config, n_before, len(loaded.head_data))
        identity = check_identity(measured.identity, train, judged, config)
        trainings = Trainings(job, loaded, train, judged, identity, steps)
        solutions = _candidates(job, measured, decision.solution)
        choices = {name: _manifest(job, loaded, measured, each).choice for name, each in solutions.items()}
        checked = run_check(trainings.trainer, choices, config, trainings.saved, job.progress)
        tell_of_check(checked, job.warnings)
    solution = solutions[checked.chosen]
    manifest = _manifest(job, loaded, measured, solution, proxy_check=checked.facts)
    return Decision(solution, manifest, decision.trained | checked.measured)


def _compare_costs(job: Job, loaded: Loaded, measured: Measured, decision: Decision) -> Decision:
    """The cheapest choice that keeps uniform LoRA's held-out loss drop within the margin; see ``cheapest_check``."""
    given = job.config
    with job.clock.stage("proxy check"):
        n_fine_tune = min(len(loaded.dataset.split_test()[0]), given.training.train_samples or len(loaded.dataset))
        job = replace(job, config=with_enough_steps(given, n_fine_tune, job.warnings))
        config = job.config
        spec, statistics = measured.spec, measured.statistics
        by_score = replace(job, config=config.by_score())
        solutions = candidates_of(
            decision.solution, config, lambda kept: solved(job, spec, statistics, kept=kept),
            lambda: solved(by_score, spec, statistics),
        )  # fmt: skip
        n_before = len(loaded.calibration) + len(loaded.held_out)
        train, judged = check_samples(loaded.dataset, config, n_before, len(loaded.head_data))
        identity = check_identity(measured.identity, train, judged, config)
        trainings = Trainings(job, loaded, train, judged, identity, config.optimization.proxy_check.steps)
        choices = {name: _manifest(job, loaded, measured, each).choice for name, each in solutions.items()}
        best = train_candidates(trainings.trainer, choices, config, trainings.saved, job.progress)
        assert decision.solution.saving is not None  # of this objective
        checked, solution = cheapest_checked(decision.solution.saving, solutions, best, config)
        job.warnings.add(told_of_cheapest(checked, solution))
    manifest = _manifest(replace(job, config=given), loaded, measured, solution, proxy_check=checked.facts)
    return Decision(solution, manifest, decision.trained | checked.measured)


def _candidates(job: Job, measured: Measured, solution: Solution) -> dict[str, Solution]:
    """The solver's choice, and what ``optimization.proxy_check.candidates`` would choose within the same budgets."""
    found = {CHOICE: solution}
    for name in job.config.optimization.proxy_check.candidates:
        if name != UNIFORM_LORA:
            found[name] = solved(job, measured.spec, measured.statistics, name)
        elif (uniform := uniform_solution(solution)) is not None:
            found[name] = uniform
        else:
            job.warnings.add("optimization.proxy_check: no uniform LoRA fits the budgets, so it is not compared")
    return found


def train_jointly(job: Job, loaded: Loaded, measured: Measured, decision: Decision, trainings: Trainings) -> Decision:
    """The whole choice, and the one that treats all layers alike, trained as the proxies were."""
    if not measured.statistics.proxies:
        return decision
    with job.clock.stage("joint proxies"):
        alike = _manifest(job, loaded, measured, solved(job, measured.spec, measured.statistics, "uniform"))
        gains = joint_gains(trainings.trainer, decision.manifest, alike, trainings.saved, job.progress)
    return replace(decision, trained=decision.trained | gains)


def _manifest(
    job: Job, loaded: Loaded, measured: Measured, solution: Solution, proxy_check: dict[str, Any] | None = None
) -> Manifest:
    made_by = run_provenance(job.config, job.threads, data_facts(measured.statistics))
    provenance = replace(memory_facts(made_by, loaded.plan, job.config), proxy_check=proxy_check)
    return make_manifest(measured.spec, solution, job.config.optimization, model=measured.model, provenance=provenance)
