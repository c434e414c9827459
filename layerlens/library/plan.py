"""``Plan``: what LayerLens chose for a model, with the proof of how good the choice is."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ConfigurationError, ManifestError
from layerlens.integrations.checkpointing import checkpoint_blocks
from layerlens.integrations.peft import lora_config
from layerlens.jobs.decision import Decision
from layerlens.jobs.explained import ExplainedLayer, explained, solution_of
from layerlens.jobs.files import report, writing
from layerlens.jobs.frontier import hulls_around, traced
from layerlens.jobs.job import Job
from layerlens.jobs.result import CHOICE_FILES, STATISTICS_FILE
from layerlens.jobs.solve import Solution
from layerlens.library.given import bare_model
from layerlens.library.profile import Profile
from layerlens.library.sentences import transformer_in
from layerlens.library.tables import plan_html, plan_text
from layerlens.manifest import write_manifest
from layerlens.manifest.files import plain
from layerlens.manifest.frontier import TracedFrontier
from layerlens.models import LORA, Choice, Manifest
from layerlens.models.manifest import SCHEMA_VERSION
from layerlens.profiling.statistics_file import statistics_to_bytes
from layerlens.tuning import apply, export_adapter
from layerlens.tuning.task_head import Head, write_head
from layerlens.utils.atomic import atomic_write_bytes
from layerlens.vocabulary import RESOURCES

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig


@dataclass(frozen=True, repr=False)
class Plan:
    """Which layers to adapt, with which method and rank, and the proof of how good this choice is.

    ``layerlens.plan``, ``layerlens.choose`` and ``layerlens.load`` return it. ``print(plan)`` shows it as a table; a
    notebook shows a heat map and a bar for each budget.

    Args:
        manifest: the choice with its certificate, its use of every budget, and its provenance.
        profile: the measurements; None if only a manifest was loaded.
        notes: what the user should know, one sentence each.
        factors: layer -> LoRA's first A, float32 [rank, n_in], if ``lora_initialization`` starts from measured data.

    >>> plan = layerlens.plan(model, loader, max_trainable_params="2k")
    >>> plan.lora_config().r == max(plan.ranks.values())
    True
    """

    manifest: Manifest
    profile: Profile | None = None
    notes: tuple[str, ...] = ()
    factors: Mapping[str, torch.Tensor] | None = field(default=None, compare=False)
    _solution: Solution | None = field(default=None, compare=False)
    _model: Any = field(default=None, compare=False)
    _head: Head = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return plan_text(self.manifest, self.notes)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return plan_html(self.manifest, self.notes)

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Plan cannot be pickled, because it refers to a model; use plan.save(DIRECTORY) and layerlens.load"
        )

    def __copy__(self) -> Plan:
        return self  # nothing about a plan can be changed

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self

    @property
    def choice(self) -> Choice:
        """The choice alone, without its costs and its proof."""
        return self.manifest.choice

    @property
    def ranks(self) -> dict[str, int]:
        """LoRA rank of each adapted layer, by module path."""
        return self.choice.lora_ranks()

    @property
    def trainable_params(self) -> int:
        """Number of parameters that the choice trains, without the task head."""
        return self.manifest.trainable_params

    @property
    def lora_share(self) -> float:
        """Share of the chosen parameters that belongs to LoRA, between 0 and 1. A LoraConfig holds only this share."""
        return self.manifest.lora_share

    @property
    def head(self) -> Head:
        """Weights of the new task head that LayerLens fitted before measuring, by name; empty if no head is new."""
        return self._head or ({} if self.profile is None else self.profile.statistics.head)

    @cached_property
    def solution(self) -> Solution:
        """The allocation problem with its costs and utilities, and the reason for each layer's option.

        Raises:
            ManifestError: there are no statistics beside the manifest.
            ActivationCacheError: the manifest was chosen from other statistics.
        """
        if self._solution is not None:
            return self._solution
        profile = self._profile()
        return solution_of(self.manifest, profile.spec, profile.statistics)

    def why(self, layer: str) -> ExplainedLayer:
        """Explain why a layer got its option: all its options with their costs, and what would make the runner-up win.

        Args:
            layer: module path of the layer, or any unique ending of the path.

        Returns:
            the explanation, with the fields ``chosen``, ``runner_up``, ``options`` and ``reasons``. It prints as a
            table and a few sentences, in a notebook too.

        Raises:
            ConfigurationError: there is no such layer (the message gives the nearest names), or no method can adapt it.
            ManifestError: the plan was loaded from a manifest without statistics beside it.

        >>> why = plan.why("model.layers.1.self_attn.v_proj")
        >>> print(why.reasons[0])  # doctest: +ELLIPSIS
        model.layers.1.self_attn.v_proj has ...
        >>> why.chosen.rank == plan.ranks.get(why.layer, 0)
        True
        """
        left_out = self.manifest.model.left_out or {}
        if layer in left_out:
            raise ConfigurationError(f"{layer} is not offered any option: {left_out[layer]}")
        return explained(self.solution, layer)

    def frontier(
        self, resource: str = "trainable_params", budgets: Sequence[float | str] = (), points: int = 10
    ) -> TracedFrontier:
        """Solve for several budgets of one resource, to show what more or less of it buys. The model is not needed.

        Args:
            resource: the resource whose budget varies: trainable_params, flops, vram_gb, latency_ms or step_ms.
            budgets: the budgets to solve for, in the resource's unit or as text ("300k", "8GB", "20ms"). By default,
                ``points`` budgets at equal distances on a logarithmic scale.
            points: number of budgets if ``budgets`` is empty, at least 2.

        Returns:
            the frontier: ``rows`` (score, bound and gap for each budget), the exact ``hull``, and ``plot()``.

        Raises:
            ConfigurationError: an unknown resource, or a budget that is not an amount of it.
            InfeasibleError: no choice fits one of the budgets.
            ManifestError: the plan was loaded from a manifest without statistics beside it.

        >>> found = plan.frontier(budgets=["1k", "2k"])
        >>> found.rows[0].score <= found.rows[1].score
        True
        >>> axes = found.plot()
        """
        if isinstance(points, bool) or not isinstance(points, int) or points < 2:
            raise ConfigurationError(f"points: must be a whole number, at least 2, got {points!r}")
        profile = self._profile()
        amounts = [_amount(resource, budget) for budget in budgets]
        found = traced(profile.spec, profile.statistics, profile.config, resource, budgets=amounts, points=points)
        used = next((use.total for use in self.manifest.resources if use.resource == resource), None)
        if used is None or self.manifest.predicted.cheapest is not None:  # whose score is a cost
            return found
        return replace(found, chosen=(used, self.manifest.score))

    def lora_config(self, model: torch.nn.Module | None = None, *, method: str | None = None) -> LoraConfig:
        """The LoRA of the choice as an ordinary ``peft.LoraConfig``, with a rank and alpha for each layer.

        ``modules_to_save`` lists a task head that the choice trains, so PEFT trains, saves and loads it too.

        Args:
            model: the base model; by default, the model that was planned for.
            method: "lora" takes the LoRA part of a choice that also has other methods, without a warning.

        Raises:
            ManifestError: the choice has no LoRA, its LoRA starts from measured factors, or the model was deleted.
        """
        if method not in (None, LORA):
            raise ManifestError(f"method: a LoraConfig holds only {LORA!r}, got {method!r}; use plan.apply(model)")
        if self.manifest.lora.is_measured:
            raise ManifestError(
                f"lora_initialization: {self.manifest.lora.initialization!r} starts from measured factors, which a "
                "LoraConfig cannot hold; use plan.apply(model), or the peft directory that plan.save writes"
            )
        if self.lora_share < 1.0 and self.choice.lora_options and method is None:
            warnings.warn(
                f"this LoraConfig holds {self.lora_share:.0%} of the chosen parameters: the choice has "
                f"{', '.join(sorted({one.method for one in self.choice.other_options}))} too, which PEFT does not "
                'have; plan with methods=["lora"], or use plan.apply(model)',
                UserWarning,
                stacklevel=2,
            )
        return lora_config(self.choice, self._base(model), base=self.manifest.model.place)

    def apply(self, model: torch.nn.Module | None = None) -> torch.nn.Module:
        """Add LoRA, adapters and prefixes to the model and freeze everything else. The outputs do not change.

        A new task head gets the weights that LayerLens fitted before measuring, as in ``peft/``.
        ``layerlens.tuning.unapply`` removes everything again and restores the model's own head.

        Args:
            model: the base model, changed in place; by default, the model that was planned for.

        Returns:
            the model to train: a PEFT model if the choice has LoRA, else ``model`` itself.

        Raises:
            ManifestError: the choice does not fit the model, which is then unchanged.
        """
        base = self._base(model)
        return apply(base, self.manifest, factors=self.factors, head=self.head, check_fingerprint=model is not None)

    def checkpoint(self, model: torch.nn.Module | None = None) -> None:
        """Turn on gradient checkpointing in the blocks that the plan names, and in no other.

        Call this after ``get_peft_model``, because a LoraConfig cannot record the blocks. Leave the trainer's own
        ``gradient_checkpointing`` off, because it checkpoints every block. ``apply`` calls this for you.

        Args:
            model: the base model, with or without adapters; by default, the model that was planned for.

        Raises:
            ManifestError: the model has no such block. The model is unchanged.
        """
        checkpoint_blocks(transformer_in(model) if model is not None else self._base(None), self.choice.checkpointed)

    def save(self, directory: str | Path, model: torch.nn.Module | None = None) -> dict[str, Path]:
        """Write the files of ``layerlens run``: manifest, adapter directory, statistics and report, all or none.

        Args:
            directory: where to write; created if missing. Files of an earlier run are replaced.
            model: the base model; by default, the model that was planned for.

        Returns:
            path of each file, by name.

        Raises:
            OutputError: the directory cannot be written.
            ManifestError: the model was deleted, or the choice does not fit it.
        """
        base, profile = self._base(model), self._profile()
        job = Job(profile.config, Path.cwd(), Path(directory).expanduser())
        with writing(job, (*CHOICE_FILES, STATISTICS_FILE)) as written:
            written.files |= write_manifest(self.manifest, written.directory, created_at=written.created_at)
            written.files |= export_adapter(self.manifest, base, written.directory, self.factors, head=self.head)
            written.files |= write_head(self.head, written.directory)
            written.files["statistics"] = atomic_write_bytes(
                written.directory / STATISTICS_FILE, statistics_to_bytes(profile.spec, profile.statistics)
            )
            hulls = hulls_around(profile.spec, profile.config.optimization, self.solution)
            report(Decision(self.solution, self.manifest), profile.statistics, {}, written, hulls)
        return written.files

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values: the fields of ``manifest.json`` except its date, and four more.

        The additional fields are ``ranks`` (LoRA rank by layer), ``trainable_params``, ``lora_share`` and ``notes``.
        """
        own = {"trainable_params": self.trainable_params, "lora_share": self.lora_share, "notes": self.notes}
        return dict(plain({"schema_version": SCHEMA_VERSION, **self.manifest.fields(), "ranks": self.ranks, **own}, ""))

    def _profile(self) -> Profile:
        if self.profile is None:
            raise ManifestError(
                f"there are no statistics beside the manifest ({STATISTICS_FILE}), so only the manifest's own figures "
                "are available"
            )
        return self.profile

    def _base(self, model: torch.nn.Module | None) -> torch.nn.Module:
        found = model if model is not None else None if self._model is None else self._model()
        if found is None:
            raise ManifestError("model: the model of this plan is gone or was never given; pass it as model=")
        return bare_model(transformer_in(found))


def weak(model: Any) -> Any:
    """A reference that does not keep the model in memory; None if ``model`` is not a module."""
    return weakref.ref(model) if hasattr(model, "parameters") else None


def _amount(resource: str, budget: float | str) -> float:
    """A budget as a number in the resource's unit."""
    if not isinstance(budget, str):
        return budget
    if resource not in RESOURCES:
        raise ConfigurationError(f"unknown resource {resource!r}; known: {', '.join(RESOURCES)}")
    try:
        return float(RESOURCES[resource].quantity.parse(budget))
    except ValueError as error:
        raise ConfigurationError(f"budgets: {error}, got {budget!r}") from error
